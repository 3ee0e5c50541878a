"""What the tokens feed: video LLMs and robot policies, attached without forking them."""
