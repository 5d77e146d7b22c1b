"""Table and notes of a dry run: time on this machine or on a named device, and what to change where memory is short."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console

from headwater.cli.dry_run import cost_table, json_row, memory_advice, memory_table, notes, print_dry_run, shares
from headwater.cli.options import DryRunOptions, dry_run_options
from headwater.config.builtin import find_recipe
from headwater.doctor import fit
from headwater.doctor.fit import device_here
from headwater.runs.hardware import DEVICES, Device
from headwater.runs.memory_estimate import DeviceMemory
from headwater.runs.node_estimate import Estimate


def holding(peak: float) -> DeviceMemory:
    """A device's memory with this peak, half of it weights and half activations."""
    return DeviceMemory(peak / 2, 0.0, 0.0, 0.0, 0.0, 0.0, peak / 2)


HERE = Device(flops=1e9, memory=4e9, bandwidth=1e9, source="measured")
NODES = [
    Estimate("teacher_rl.s0.1a2b", 8, 10, 1000, 0, flops=0.4e9 * 90, bytes=1e9, memory=holding(3e9)),
    Estimate("opd.s0.3c4d", 0, 10, 1000, 1000, flops=0.4e9 * 600, bytes=3e9, memory=holding(5e9)),
]
PLAIN = DryRunOptions(None, 1, None)


def test_table_gives_time_on_this_machine() -> None:
    """0.4e9 FLOP/s are expected of 1e9: 90 and 600 seconds."""
    table = cost_table(NODES, PLAIN, HERE)
    assert table.columns[-1].header == "time here" and list(table.columns[-1].cells) == ["90 s", "10.0 min"]
    assert [column.header for column in cost_table(NODES, PLAIN, None).columns][-1] == "peak"
    text = "\n".join(notes(NODES, PLAIN, HERE))
    assert (
        "here: about 11.5 min if nodes run one after the other; at most 5.00 GB at once of 4.00 GB that are free, which"
        in text
    )
    assert "does not fit" in text and "an estimate from 40% of 1.00 GFLOP/s as measured just now" in text


def test_table_of_several_arms_names_them_within_hundred_columns() -> None:
    nodes = [
        Estimate(
            "teacher_rollouts.s10.1a2b",
            8000,
            1000,
            999_000,
            999_000,
            flops=999e12,
            bytes=999e9,
            memory=holding(999e9),
        ),
        Estimate("opd.s10.3c4d", 0, 10, 1000, 1000, flops=0.4e9 * 600, bytes=3e9, memory=holding(5e9)),
        Estimate("base_student.s10.5e6f", 0, 0, 1000, 0, flops=1e9, bytes=3e9, memory=holding(5e9)),
    ]
    arms_of = {
        nodes[0].name: ["bridge", "exopd", "proximal", "first_tokens"],
        nodes[1].name: ["length_schedule_compute"],
        nodes[2].name: [],
    }
    table = cost_table(nodes, PLAIN, HERE, arms_of)
    assert list(table.columns[-1].cells) == ["bridge +3", "length_schedule_compute", ""]
    text = StringIO()
    Console(file=text, width=100).print(table)
    rows = text.getvalue().splitlines()
    assert max(map(len, rows)) <= 100 and len([row for row in rows if ".s10" in row]) == 3
    (row,) = (row for row in rows if "opd.s10" in row)
    assert "10.0 min" in row and "length_schedule" in row
    assert "at most" in rows[0] and "arms" not in [column.header for column in cost_table(nodes, PLAIN, HERE).columns]


def test_named_device_gives_hours_from_its_datasheet() -> None:
    options = DryRunOptions("h100", 2, None)
    device = Device(flops=1e9, memory=4e9, bandwidth=1e9, source="sheet")
    assert cost_table(NODES, options, device).columns[-1].header == "GPU-hours"
    assert "on 2 × h100: 0.19 GPU-hours, 0.096 hours" in "\n".join(notes(NODES, options, device))


def test_memory_table_shows_shared_parts_once() -> None:
    nodes = [
        Estimate(
            "warmup.s0.1a2b", 0, 10, 0, 0, flops=1.0, bytes=1e9, memory=DeviceMemory(1e9, 2e9, 0, 4e9, 5e9, 6e9, 7e9)
        ),
        Estimate(
            "opd.s0.3c4d", 0, 10, 0, 0, flops=1.0, bytes=1e9, memory=DeviceMemory(1e9, 2e9, 0, 4e9, 5e9, 6e9, 7e9)
        ),
        Estimate("base.s0.5e6f", 0, 0, 0, 0, flops=1.0, bytes=1e9, memory=DeviceMemory(0, 0, 3e9, 0, 0, 0, 0)),
    ]
    table = memory_table(nodes, "memory of each of 8 × h100")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["node"] == ["warmup +1", "base"] and columns["peak"] == [
        "16.0 GB",
        "3.00 GB",
    ]  # 1 + 2 + the larger of 9 and 13
    assert columns["teachers"] == ["", "3.00 GB"] and columns["sampler"] == ["4.00 GB", ""]
    text = StringIO()
    Console(file=text, width=100).print(table)
    assert max(map(len, text.getvalue().splitlines())) <= 100


def test_device_is_named_in_either_case() -> None:
    for text in ("8xH100", "8xh100", "8XH100"):
        assert dry_run_options(True, text, None) == DryRunOptions("h100", 8, None)
    assert dry_run_options(True, "A100-80", None) == DryRunOptions("a100-80", 1, None)


def test_memory_advice_names_largest_node_and_unused_settings() -> None:
    recipe = find_recipe("pocket", [])
    assert memory_advice(NODES[:1], recipe, HERE.memory, PLAIN) is None
    weights = str(memory_advice(NODES, recipe, HERE.memory, PLAIN))
    assert weights.startswith(
        "memory: opd.s0 needs 5.00 GB and 4.00 GB are free here: train adapters (models.lora={r: 32})"
    )
    assert "gradient_checkpointing" not in weights  # 2 of the 5 GB are activations
    adapters = find_recipe("pocket", ["models.lora={r: 4, quantize: nf4}", "models.dtype=bfloat16"])
    activations = [Estimate("opd.s0.3c4d", 0, 10, 0, 0, flops=1.0, bytes=1e9, memory=holding(5e9))]
    assert memory_advice(activations, adapters, HERE.memory, DryRunOptions("l40s", 1, None)) == (
        "memory: opd.s0 needs 5.00 GB and l40s has 4.00 GB: set models.gradient_checkpointing=true, lower compute.microbatch_tokens "
        f"(now {adapters.compute.microbatch_tokens}), compute.sample_batch (now {adapters.compute.sample_batch}), name a larger "
        "device or more of them with --on"
    )


def test_rates_are_measured_with_threads_and_dtype_of_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more threads than free cores a product is measured up to twenty times too slow, in another dtype up to ten times."""
    before, measured = torch.get_num_threads(), []

    def device(_: torch.device, dtype: torch.dtype) -> Device:
        measured.append((torch.get_num_threads(), dtype))
        return HERE

    monkeypatch.setattr("headwater.cli.dry_run.device_here", device)
    recipe = find_recipe("pocket-skills", ["models.dtype=bfloat16"])
    assert recipe.compute.threads == 1
    torch.set_num_threads(2)
    try:
        print_dry_run(recipe, ["bridge"], [0], PLAIN, as_json=False)
    finally:
        torch.set_num_threads(before)
    assert measured == [(1, torch.bfloat16)]


def test_shares_of_same_name_are_one_range() -> None:
    assert shares([("opd.s0", 0.5), ("warmup.s0", 0.1), ("opd.s0", 0.25), ("opd.s1", 0.5)]) == (
        "opd.s0 25–50%, warmup.s0 10%, opd.s1 50%"
    )
    assert shares([]) == ""


def test_rates_are_measured_once_for_each_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`headwater grpo` fits its recipe before it sets the recipe's threads; its dry run must not take those rates."""
    measured: list[int] = []
    monkeypatch.setattr(fit, "_best_seconds", lambda work: measured.append(torch.get_num_threads()) or 1.0)
    fit._rates.cache_clear()
    try:
        for threads in (2, 1, 1):
            torch.set_num_threads(threads)
            device_here(torch.device("cpu"), torch.float32)
    finally:
        fit._rates.cache_clear()
    assert measured == [2, 2, 1, 1]


def test_rates_of_this_machine_are_plausible() -> None:
    here = device_here(torch.device("cpu"), torch.float32)
    assert 1e8 < here.flops < 1e15 and 1e7 < here.bandwidth < 1e13 and here.memory > 1e8


def test_notes_give_share_of_teacher_scoring_by_time_or_flops() -> None:
    # 200 of 1,000 GFLOPs. On a device that reads 0.6e9 bytes/s, decoding of 400 GFLOPs takes 3,000 s instead of 1,000, and the
    # other 600 take 1,500: scoring is 500 of 4,500 seconds.
    node = Estimate(
        "opd.s0.3c4d",
        0,
        10,
        0,
        0,
        flops=1e12,
        bytes=1.0,
        memory=holding(1.0),
        scoring=2e11,
        training=(1e12, (1.8e12, 4e11)),
    )
    assert node.scoring_share(None) == 0.2 and node.scoring_share(HERE) == 500 / 4500
    assert "the teacher's scoring takes, of the FLOPs of a step: opd.s0 20%" in "\n".join(notes([node], PLAIN, None))
    assert "of the time of a step: opd.s0 11%" in "\n".join(notes([node], PLAIN, HERE))
    assert node.row()["scoring_share_of_flops"] == 0.2 and not any(
        "scoring" in line for line in notes(NODES, PLAIN, None)
    )
    named = json_row(node, DryRunOptions("h100", 1, None))
    assert named["scoring_share_of_hours"] == node.scoring_share(DEVICES["h100"])
