"""Bars: on stderr, within 80 columns, with unit, rate and time; where nobody looks, none."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tiny import byte_tokenizer, tiny_model

from care_mla.interrupts import STOP
from care_mla.progress import is_watched, rate, rich_meter, rich_track, shown
from care_mla.text.sampling import sample_from_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In place of stderr, of 80 columns; no fixture, as pytest sets stderr anew after those."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, value in (("TERM", "dumb"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    return sys.stderr  # type: ignore[return-value]


def test_a_bar_says_what_how_much_and_how_fast_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    long = "Sampling a text of many words from the model"
    for _ in rich_track(range(3), long, 524_288, unit="tokens", size=lambda _: 262_144):
        time.sleep(0.05)
    line = next(line for line in terminal.getvalue().splitlines() if "524,288/524,288" in line)
    assert len(line) <= 80 and line.startswith("Sampling a text of many wor…") and "tokens" in line and "/s" in line


def test_the_numbers_of_a_training_run_are_cut_to_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    with rich_meter(200_000, "tokens") as show:
        show(200_000, {"loss": 1.2345678, "eval": 0.1, "lr": 1e-3, "norm": 2.0, "more": 3.0})
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and any("200,000/200,000 tokens loss 1.235" in line for line in lines)


def test_bars_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    assert list(shown(range(2), "Writing layers", 2, unit="layers")) == [0, 1]
    assert "2/2 layers" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_watched() and list(shown(range(2), "Writing layers", 2, unit="layers")) == [0, 1]
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert is_watched()


def test_a_stop_is_heeded_at_the_next_item(monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch)
    monkeypatch.setattr(STOP, "is_set", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        list(rich_track(range(2), "Writing layers", 2))


@pytest.mark.parametrize(("speed", "text"), [(None, ""), (0.4, "2.5 s each"), (2.0, "2.0/s"), (1234.5, "1,234/s")])
def test_rates(speed: float | None, text: str) -> None:
    assert rate(speed) == text


def test_every_sampled_token_moves_the_bar() -> None:
    """Not one jump a batch, which takes half a minute; every token is counted once."""
    moves: list[int] = []

    def track(items: Iterable[Any], description: str, total: int, *, unit: str, size: Callable[[Any], int]) -> Any:
        assert (total, unit) == (5 * 8, "tokens")
        for item in items:
            yield item
            moves.append(size(item))

    rows = sample_from_model(tiny_model("llama"), byte_tokenizer(), 5, 8, 0, batch_size=3, track=track)  # type: ignore[arg-type]
    assert rows.shape == (5, 8) and sum(moves) == 40 and len(moves) == 2 * 8
