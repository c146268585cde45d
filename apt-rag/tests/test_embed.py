from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from apt_rag.embed import HashedNgrams

PRINT = (
    "from apt_rag.embed import HashedNgrams as H; c, v = H().count('Copy a File, naïve'); print(c.tolist(), v.tolist())"
)


def test_every_process_counts_the_same() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    cells, values = HashedNgrams().count("Copy a File, naïve")
    assert printed == {f"{cells.tolist()} {values.tolist()}\n"}


def test_counts_do_not_change_between_versions() -> None:
    cells, values = HashedNgrams(features=2**12, words=1, characters=None).count("copy the file, copy the mode")
    assert dict(zip(cells.tolist(), values.tolist(), strict=True)) == {1552: -1.0, 1963: -1.0, 2946: 2.0, 3558: 2.0}


def test_case_and_compatibility_forms_do_not_matter() -> None:
    one, other = HashedNgrams().count("ﬁle Name"), HashedNgrams().count("FILE name")
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_text_without_words_touches_nothing() -> None:
    cells, values = HashedNgrams().count("--- !!!")
    assert len(cells) == len(values) == 0


@pytest.mark.parametrize("changed", [{"features": 2**14}, {"words": 1}, {"characters": None}, {"characters": (2, 5)}])
def test_every_setting_is_in_the_digest_and_changes_the_counts(changed: dict[str, object]) -> None:
    text = "retrieval of passages that bear on a question, by what they share with it"
    other = HashedNgrams(**changed)  # type: ignore[arg-type]
    assert other.digest != HashedNgrams().digest == HashedNgrams().digest
    assert len(other.count(text)[0]) != len(HashedNgrams().count(text)[0]) or other.features != HashedNgrams().features


def test_inner_products_are_kept_in_the_mean_over_hashed_words() -> None:
    # Weinberger et al. 2009, section 3: signed hashing is unbiased, so many disjoint texts have a mean product near 0.
    embedder = HashedNgrams(features=2**8, words=1, characters=None)
    products = []
    for number in range(200):
        vectors = np.zeros((2, 2**8))
        for row in (0, 1):
            cells, values = embedder.count(" ".join(f"w{number}x{row}x{word}" for word in range(20)))
            vectors[row, cells] = values
        products.append(vectors[0] @ vectors[1] / 20)
    assert abs(float(np.mean(products))) < 4 * float(np.std(products)) / len(products) ** 0.5
    assert float(np.std(products)) > 0
