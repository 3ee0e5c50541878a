"""Our operators against stored outputs of the reference, and the checker against damage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.errors import SourceError
from stream.golden import Case, check_folder

FOLDER = Path(__file__).resolve().parent.parent / "goldens" / "holitom"
PASSES = {
    "edge_identical_T8.npz": 32,
    "edge_one_frame.npz": 32,
    "edge_one_moving_patch_T8.npz": 32,
    "edge_one_static_patch_T8.npz": 32,
    "edge_random_T8.npz": 32,
    "edge_two_frames.npz": 20,
    "edge_two_identical.npz": 32,
    "edge_zero_frames_T6.npz": 16,
    "functions.npz": 66,
    "inner_merge.npz": 11,
    "pipe_T4_N169_D64.npz": 40,
    "pipe_T8_N49_D64.npz": 48,
}
FUNCTIONS, PIPELINE, INNER = "functions.npz", "edge_one_static_patch_T8.npz", "inner_merge.npz"


@pytest.mark.parametrize("name", sorted(PASSES))
def test_all_stable_cases_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(FOLDER / name)
    cases = check_folder(tmp_path)[name]
    assert [case for case in cases if case.verdict == "failed"] == []
    assert Counter(case.verdict for case in cases)["passed"] >= PASSES[name]


def test_no_golden_file_goes_unchecked() -> None:
    assert {path.name for path in FOLDER.glob("*.npz")} == set(PASSES)


def check_changed(
    name: str, folder: Path, changes: dict[str, NDArray[Any]], drop: str = ""
) -> dict[str, Case]:
    """The cases of a copy with some arrays replaced and one left out."""
    with np.load(FOLDER / name) as stored:
        arrays = {key: stored[key] for key in stored.files if key != drop}
    assert changes.keys() <= arrays.keys()
    np.savez(folder / name, allow_pickle=False, **(arrays | changes))
    return {case.name: case for case in check_folder(folder)[name]}


def flipped(name: str, key: str, by: float) -> NDArray[Any]:
    """The array with its middle value moved."""
    with np.load(FOLDER / name) as stored:
        array: NDArray[Any] = stored[key].copy()
    array.reshape(-1)[array.size // 2] += np.asarray(by).astype(array.dtype)
    return array


@pytest.mark.parametrize(
    ("key", "by"),
    [
        ("dpc00_centers", 1),
        ("win00_segments", 1),
        ("win00_total_reduced", 1),
        ("clus00_out_beta", 1e-3),
        ("clus00_out_mean", 1e-3),
        ("attd00_out_pos", 1),
        ("attd00_out_beta", 1e-3),
        ("attd00_out_mean", 1e-3),
        ("dens00_out_pos", 1),
        ("dens00_out_beta", 1e-3),
        ("dens00_out_mean", 1e-3),
        ("split00_n_static", 1),
        ("split00_n_dynamic", -1),
        ("split00_static_pos", 1),
        ("split00_dynamic_pos", 1),
        ("split00_static_feat", 1e-3),
        ("nl00_out", 1e-3),
    ],
)
def test_one_wrong_value_of_a_function_fails_its_case_alone(
    key: str, by: float, tmp_path: Path
) -> None:
    cases = check_changed(FUNCTIONS, tmp_path, {key: flipped(FUNCTIONS, key, by)})
    failed = [case for case in cases.values() if case.verdict == "failed"]
    assert [case.name for case in failed] == [key.split("_")[0]]
    assert failed[0].why


@pytest.mark.parametrize(("key", "by"), [("m03_kept_pos", 1), ("m03_out", 1e-3)])
def test_one_wrong_value_of_the_inner_merge_fails(key: str, by: float, tmp_path: Path) -> None:
    cases = check_changed(INNER, tmp_path, {key: flipped(INNER, key, by)})
    assert [name for name, case in cases.items() if case.verdict == "failed"] == ["m03"]


@pytest.mark.parametrize(
    ("key", "by", "why"),
    [
        ("c000_segments", 1, "segments"),
        ("c000_n_static_patches", 1, "static patches"),
        ("c000_n_static_tokens", 1, "static tokens"),
        ("c000_n_dynamic_tokens", 1, "dynamic tokens"),
        ("c000_dynamic_pos", 1, "dynamic positions"),
        ("c000_sketch", 0.01, "sketch"),
        ("c024_sequence", 0.01, "sequence"),
    ],
)
def test_one_wrong_value_of_a_pipeline_fails_its_case_alone(
    key: str, by: float, why: str, tmp_path: Path
) -> None:
    cases = check_changed(PIPELINE, tmp_path, {key: flipped(PIPELINE, key, by)})
    failed = [case for case in cases.values() if case.verdict == "failed"]
    assert [case.name for case in failed] == [key.split("_")[0]]
    assert why in failed[0].why


@pytest.mark.parametrize(
    ("key", "by"),
    [("total_reduced", 1), ("corrected_ratio", 1e-9), ("seq_len", 1), ("features", 4), ("attn", 1)],
)
def test_a_wrong_value_for_all_cases_fails_some(key: str, by: float, tmp_path: Path) -> None:
    cases = check_changed(PIPELINE, tmp_path, {key: flipped(PIPELINE, key, by)})
    assert "failed" in {case.verdict for case in cases.values()}


def test_counts_are_compared_where_positions_are_unstable(tmp_path: Path) -> None:
    name = "edge_two_frames.npz"
    skipped = [c.name for c in check_changed(name, tmp_path, {}).values() if c.verdict == "skipped"]
    key = f"{skipped[0]}_n_static_tokens"
    cases = check_changed(name, tmp_path, {key: flipped(name, key, 1)})
    assert cases[skipped[0]].verdict == "failed"


@pytest.mark.parametrize(
    ("name", "key", "case"),
    [
        (FUNCTIONS, "win00_segments", "win00"),
        (FUNCTIONS, "attd00_x", "attd00"),
        (INNER, "m00_out", "m00"),
        (PIPELINE, "c000_segments", "c000"),
        (PIPELINE, "c000_sta_stable", "c000"),
        (PIPELINE, "c024_sequence", "c024"),
        (PIPELINE, "newline", "c000"),
        (PIPELINE, "seq_len", "c000"),
        (PIPELINE, "features", "file"),
        (PIPELINE, "combo_ratio", "file"),
    ],
)
def test_a_missing_array_fails_and_is_named(name: str, key: str, case: str, tmp_path: Path) -> None:
    found = check_changed(name, tmp_path, {}, drop=key)[case]
    assert found.verdict == "failed"
    assert key.removeprefix(case + "_") in found.why


def test_an_array_of_another_shape_fails(tmp_path: Path) -> None:
    with np.load(FOLDER / PIPELINE) as stored:
        short = stored["attn"][:, :-1]
    cases = check_changed(PIPELINE, tmp_path, {"attn": short})
    assert {case.verdict for case in cases.values()} == {"failed"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_fails(share: float, tmp_path: Path) -> None:
    whole = (FOLDER / FUNCTIONS).read_bytes()
    (tmp_path / FUNCTIONS).write_bytes(whole[: int(share * len(whole))])
    (tmp_path / INNER).symlink_to(FOLDER / INNER)
    results = check_folder(tmp_path)
    assert [case.verdict for case in results[FUNCTIONS]] == ["failed"]
    assert "cannot be read" in results[FUNCTIONS][0].why
    assert {case.verdict for case in results[INNER]} == {"passed"}


def test_a_flipped_byte_fails(tmp_path: Path) -> None:
    data = bytearray((FOLDER / INNER).read_bytes())
    data[len(data) // 3] ^= 0xFF
    (tmp_path / INNER).write_bytes(data)
    assert "failed" in {case.verdict for case in check_folder(tmp_path)[INNER]}


def test_pickled_arrays_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", m00_hidden=np.array([{}], dtype=object))
    (case,) = check_folder(tmp_path)["objects.npz"]
    assert case.verdict == "failed"
    assert "cannot be read" in case.why


def test_an_unknown_file_is_said_not_passed_over(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", allow_pickle=False, x=np.ones(3))
    with pytest.raises(SourceError, match="holds no golden file"):
        check_folder(tmp_path)
    (tmp_path / INNER).symlink_to(FOLDER / INNER)
    (case,) = check_folder(tmp_path)["other.npz"]
    assert (case.verdict, case.why) == ("skipped", "holds no case of a known kind")


def test_no_folder_or_an_empty_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no golden file"):
        check_folder(tmp_path)
    with pytest.raises(SourceError, match="is not a folder"):
        check_folder(tmp_path / "missing")
