"""Scripts, renders and questions: repeatable, split cleanly, and true to what is drawn."""

import random

import pytest
import torch

from policies.video.tiny.questions import CHOICES, ORDINALS, TEMPLATES, TYPES, all_questions
from policies.video.tiny.render import pack_scenes, render, token_labels
from policies.video.tiny.world import (
    COLORS,
    FRAME_PX,
    HELDOUT_SCALES,
    Scene,
    Thing,
    is_heldout_hue,
    make_scene,
)

SCENES = [make_scene("heldout", index) for index in range(60)]


def frames_at(scene: Scene, *times_s: float) -> torch.Tensor:
    """[T, 3, 224, 224]."""
    return render(pack_scenes([scene]), torch.tensor([times_s]))[0]


def test_the_same_arguments_give_the_same_scene_and_the_same_pixels() -> None:
    assert make_scene("train", 7) == make_scene("train", 7)
    assert make_scene("train", 7) != make_scene("heldout", 7)
    first, second = (frames_at(make_scene("train", 7), 0.5, 6.0) for _ in range(2))
    assert torch.equal(first, second)


def test_a_batch_renders_like_its_scenes_alone() -> None:
    pair = SCENES[:2]
    together = render(pack_scenes(pair), torch.tensor([[1.0, 9.0]] * 2))
    for scene, frames in zip(pair, together, strict=True):
        torch.testing.assert_close(frames, frames_at(scene, 1.0, 9.0))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_backgrounds_of_the_two_splits_are_disjoint(split: str) -> None:
    low, high = HELDOUT_SCALES
    for index in range(100):
        for shot in make_scene(split, index).shots:  # type: ignore[arg-type]
            heldout = split == "heldout"
            assert is_heldout_hue(shot.hue) == heldout
            assert (low <= shot.scale < high) == heldout


@pytest.mark.parametrize("n_frames", [4, 8, 16, 32])
def test_shots_tile_the_video_and_nothing_crosses_a_cut(n_frames: int) -> None:
    for index in range(50):
        scene = make_scene("train", index, n_frames)
        ends = [shot.end_s for shot in scene.shots]
        assert [shot.start_s for shot in scene.shots] == [0.0, *ends[:-1]]
        assert ends[-1] == pytest.approx(scene.duration_s)
        for thing in scene.things:
            shot = scene.shot_at(thing.start_s)
            assert shot.start_s <= thing.start_s < thing.end_s <= shot.end_s + 1e-6


@pytest.mark.parametrize("phase", [0.01, 0.5, 0.99])
def test_brief_things_are_seen_once_or_twice_whatever_the_phase(phase: float) -> None:
    for scene in SCENES:
        times_s = [(i + phase) * scene.interval_s for i in range(scene.n_frames)]
        for thing in scene.of("star", "brief"):
            assert sum(thing.start_s <= t < thing.end_s for t in times_s) in (1, 2)


def test_things_are_drawn_where_and_when_the_script_says() -> None:
    scene = next(scene for scene in SCENES if scene.of("star"))
    star = scene.of("star")[0]
    middle_s = (star.start_s + star.end_s) / 2
    frame = frames_at(scene, middle_s)[0]
    x, y = (int(c) for c in star.at(middle_s))
    torch.testing.assert_close(frame[:, y, x], torch.tensor(COLORS[star.color]), atol=0.02, rtol=0)
    gone = frames_at(scene, star.end_s + 1e-3)[0]
    assert not torch.allclose(gone[:, y, x], frame[:, y, x], atol=0.05)


def test_token_labels_name_the_thing_under_its_centre() -> None:
    for scene in SCENES[:10]:
        for thing in scene.of("still", "star", "brief", "mover"):
            now_s = (thing.start_s + thing.end_s) / 2
            labels = token_labels(pack_scenes([scene]), torch.tensor([[now_s]]))
            x, y = thing.at(now_s)
            at = int(y // 16) * 14 + int(x // 16)
            assert labels["color"][0, 0, at] == 1 + list(COLORS).index(thing.color)
            assert labels["row"][0, 0, at] == int(y // 16)


def true_answer(scene: Scene, kind: str, text: str) -> str:
    """An answer found again from the script and the words of the question alone."""
    words = text.lower().replace("?", "").replace(".", "").replace(",", "").split()
    said = [word for word in words if word in COLORS]
    seen = [thing for thing in scene.things if thing.kind != "pebble"]
    stars = sorted(scene.of("star"), key=lambda thing: thing.end_s)
    end = -1 if "last" in words else 0

    def only(things: list[Thing]) -> Thing:
        assert len(things) == 1
        return things[0]

    def star(color: str) -> Thing:
        return only([thing for thing in stars if thing.color == color])

    match kind:
        case "still_color" | "brief_color":
            return only([thing for thing in seen if thing.shape in words]).color
        case "still_shape" | "brief_shape":
            return only([thing for thing in seen if thing.color == said[0]]).shape
        case "last_star":
            return stars[end].color
        case "order":
            return min(said, key=lambda color: star(color).start_s)
        case "when":
            quarter = 4 * (star(said[0]).start_s + star(said[0]).end_s) / 2 / scene.duration_s
            return ORDINALS[int(quarter)]
        case "where":
            thing = only([t for t in seen if t.color == said[0] and t.shape in words])
            dx, dy = thing.x_px / FRAME_PX - 0.5, thing.y_px / FRAME_PX - 0.5
            if max(abs(dx), abs(dy)) < 0.15:
                return "center"
            across = "left" if dx < 0 else "right"
            return across if abs(dx) > abs(dy) else "top" if dy < 0 else "bottom"
        case "behind":
            inside = [s for s in scene.shots if s.start_s <= star(said[0]).start_s < s.end_s]
            return inside[0].surface
        case "direction" | "mover_shape":
            thing = only(scene.of("mover"))
            (x0, y0), (x1, y1) = thing.at(thing.start_s), thing.at(thing.end_s)
            if kind == "mover_shape":
                return thing.shape
            if abs(x1 - x0) > abs(y1 - y0):
                return "right" if x1 > x0 else "left"
            return "down" if y1 > y0 else "up"
        case "count":
            return ("one", "two", "three", "four")[len(stars) - 1]
        case "cut_color":
            shot = scene.shots[end]
            here = [t for t in seen if t.shape in words and shot.start_s <= t.start_s < shot.end_s]
            return only(here).color
        case "surface":
            return scene.shots[end].surface
    raise AssertionError(kind)


def test_answers_agree_with_the_script() -> None:
    asked = dict.fromkeys(TYPES, 0)
    for scene in SCENES:
        for kind, questions in all_questions(scene, random.Random(0)).items():
            for question in questions:
                assert question.answer in question.choices
                assert question.answer == true_answer(scene, kind, question.text), question
                asked[kind] += 1
    assert min(asked.values()) >= 20


def test_answers_are_balanced_within_a_type() -> None:
    counts: dict[str, dict[str, int]] = {kind: {} for kind in TYPES}
    for index in range(400):
        for kind, questions in all_questions(make_scene("train", index), random.Random(0)).items():
            if questions:
                answer = random.Random(index).choice(questions).answer
                counts[kind][answer] = counts[kind].get(answer, 0) + 1
    for kind, by_answer in counts.items():
        even = sum(by_answer.values()) / len(CHOICES[kind])
        assert max(by_answer.values()) < 1.6 * even, kind


def test_every_type_has_several_wordings() -> None:
    assert all(len(set(TEMPLATES[kind])) >= 3 for kind in TYPES)
