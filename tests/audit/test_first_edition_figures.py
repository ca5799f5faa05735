"""The figures that the first edition made of its measurements, key by key."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from biasmap_fast.audit.summary import KEYS, summarise

NUMBERS = ["estimate", "low", "high", "n", "p", "p_adjusted"]


def test_every_figure_of_the_first_edition_is_there_with_the_same_numbers(summary):
    expected = pd.read_parquet(Path(__file__).parent / "first_edition" / "figures.parquet")
    assert not summary.figures.duplicated(KEYS).any()
    both = expected.merge(summary.figures, on=KEYS, how="left", suffixes=("", "_now"))
    missing = both[both["method_now"].isna()][KEYS]
    assert missing.empty, missing
    for name in NUMBERS:
        now, then = both[f"{name}_now"].astype(float), both[name].astype(float)
        differ = ((now - then).abs() > 1e-6) | (now.isna() != then.isna())
        assert not differ.any(), both[differ][[*KEYS, name, f"{name}_now"]]


def test_figures_depend_on_no_order_of_the_records(first_edition, summary):
    mixed = {
        name: first_edition[name].sample(frac=1, random_state=seed)
        for seed, name in enumerate(("pictures", "measurements", "masks"))
    }
    again = summarise(**(first_edition | mixed))
    pd.testing.assert_frame_equal(again.figures, summary.figures, check_exact=True)
    assert again.run == summary.run
