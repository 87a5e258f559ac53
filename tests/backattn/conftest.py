"""What tests of the method share."""

import pandas as pd
import pytest

from backattn.training.batches import numbers

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="session")
def sums():
    """Three questions whose answers are numbers."""
    prompts = ["one plus two is", "five plus one is", "two is"]
    return pd.DataFrame({"prompt": prompts, "answer": [" 3", " 6", " 12"]})


@pytest.fixture
def items(llama):
    """24 tokenised questions whose answers are numbers, of several lengths."""
    rows = [
        (f"{WORDS[i % 10]} plus {WORDS[i // 10]} is", f" {i % 10 + i // 10 + 2}") for i in range(24)
    ]
    return numbers(llama[1], pd.DataFrame(rows, columns=["prompt", "answer"]))
