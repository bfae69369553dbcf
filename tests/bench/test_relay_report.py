"""Medians, ratios and the table, from samples made by hand."""

import json
from pathlib import Path

import pytest

from headrace_bench import peers
from headrace_bench.relay import Plan, figures, parse_arguments, quick
from headrace_bench.relay_report import Figure, Samples, document, machine, markdown, ratio_to_baseline
from headrace_bench.spread import Spread, ratios, spread

FIGURES = (Figure("cost", "µs", 1, True), Figure("abort", "abort ms", 1))


def samples() -> list[Samples]:
    ours, theirs = Samples("headrace", "0.1"), Samples("vllm-router", "1")
    for mine, other in ((10.0, 40.0), (15.0, 60.0), (None, 50.0)):
        ours.add("cost", mine)
        theirs.add("cost", other)
    theirs.add("abort", float("inf"))
    return [ours, theirs]


def test_spread_is_the_median_and_the_extremes() -> None:
    assert spread([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)
    assert spread([]) is None


def test_ratios_pair_the_rounds_and_skip_those_that_one_side_missed() -> None:
    assert ratios([1.0, None, 3.0], [2.0, 2.0, None]) == [0.5]


def test_ratio_is_taken_round_by_round() -> None:
    found = ratio_to_baseline(samples(), "headrace", "cost")
    assert found is not None and [found.low, found.high] == [0.25, 0.25]
    assert ratio_to_baseline(samples(), "vllm-router", "cost") is None
    assert ratio_to_baseline(samples()[:1], "headrace", "cost") is None


def test_the_page_has_a_row_per_gateway_and_says_never_for_what_never_happened() -> None:
    page = markdown(samples(), FIGURES, {"title": "T", "date": "today"}, "notes")
    assert "| headrace 0.1 | 12.5 (10.0..15.0) | 0.25 (0.25..0.25) | - |" in page
    assert "| vllm-router 1 | 50.0 (40.0..60.0) | 1 | never |" in page


def test_the_document_is_json_with_every_round() -> None:
    made = json.loads(json.dumps(document(samples(), FIGURES, {"date": "today"}), allow_nan=False))
    assert made["gateways"]["headrace"]["figures"]["cost"]["rounds"] == [10.0, 15.0, None]
    assert made["gateways"]["vllm-router"]["figures"]["abort"]["median"] == "never"


def test_the_machine_is_told_in_general_terms() -> None:
    assert "-core" in machine() and "GiB" in machine()


def test_arguments_are_checked_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_arguments(["--prompt-bytes", "1024,32768", "--gateways", "haproxy"])
    assert args.sizes == (1024, 32768) and args.names == ("haproxy",)
    for wrong in (["--gateways", "nginx"], ["--prompt-bytes", "big"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
    assert "no gateway is called nginx" in capsys.readouterr().err


def test_every_prompt_size_is_a_column_of_its_own() -> None:
    keys = [figure.key for figure in figures(quick(Plan(rounds=5, prompt_bytes=(1024, 32768))))]
    assert "request_us_1024" in keys and "request_us_32768" in keys and len(set(keys)) == len(keys)


def test_a_peer_that_cannot_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerMissing, match="no gateway is called nginx"):
        peers.launch("nginx", ["http://127.0.0.1:1"], "round_robin", tmp_path)
    ours = peers.launch("headrace", ["http://127.0.0.1:1"], "random", tmp_path)
    assert ours.url is None and "--no-access-log" in ours.command
    assert ours.command[ours.command.index("--backend") + 1] == "http://127.0.0.1:1"
