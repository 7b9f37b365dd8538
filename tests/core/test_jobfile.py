"""The job file: what it may say, and that every mistake is named with its line."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import UsageError
from holdfast.core.jobfile import (
    Accelerator,
    CheckpointBlock,
    JobFile,
    PlanBlock,
    Resources,
    parse_deadline,
    parse_dollars,
    parse_floor,
    parse_job,
    parse_rate,
    read_job,
)

WHOLE = """
name: gpt
workdir: .
num_nodes: 4
envs: {COUNTRY: NO, LEVEL: 010, TOKEN: null}
secrets: {KEY: 0x10}
file_mounts: {/data: s3://bucket/data}
setup: pip install .
run: |
  python train.py
resources:
  accelerators: A100:8
  cpus: 32+
  memory: 64
  use_spot: true
  max_hourly_cost: 40
  autostop: 10
  job_recovery: {strategy: FAILOVER, max_restarts_on_errors: 3, recover_on_exit_codes: [33, 34]}
  any_of:
    - infra: aws/us-east-1
    - infra: gcp
      accelerators: {H100: 8}
spot_policy: auto
max_price: $39.50
max_duration: 5d
idle_duration: 10m
budget: "$1,200"
deadline: 60h
checkpoint: {url: s3://bucket/runs/gpt, size: 14GiB, save_every: 10 min, max_lost_work: 2 %, bandwidth: 400 MiB/s, stall: 2s}
on_demand_floor: 25%
plan: {work: {A100:8: 48h, H100:8: 22h}, step_time: 0.5s, tasks: false, engineering_hours: 8, hourly_rate: 100}
"""


def test_everything_that_can_be_said() -> None:
    job = parse_job(WHOLE)
    assert (job.name, job.num_nodes, job.run) == ("gpt", 4, "python train.py\n")
    assert job.envs == {"COUNTRY": "NO", "LEVEL": "010", "TOKEN": None}
    assert job.secrets == {"KEY": "0x10"}
    assert (job.budget, job.max_price, job.max_duration, job.idle_duration) == (1200.0, 39.5, 432_000.0, 600.0)
    assert job.deadline is not None
    assert job.deadline.left_s(1e9) == 216_000.0
    assert job.floor_nodes == 1
    assert isinstance(job.checkpoint, CheckpointBlock)
    assert job.checkpoint.size == 14 * 1024**3
    assert job.checkpoint.bandwidth == 400.0 * 1024**2
    assert job.plan.work_s == {"A100:8": 172_800.0, "H100:8": 79_200.0}
    first, second = job.resources.alternatives()
    assert (first.infra, first.wanted, first.max_hourly_cost) == ("aws/us-east-1", (Accelerator("A100", 8),), 40.0)
    assert (second.infra, second.wanted, second.cpus) == ("gcp", (Accelerator("H100", 8),), "32+")


def test_nothing_said() -> None:
    assert parse_job("") == parse_job("# nothing\n") == JobFile()
    assert JobFile().resources.alternatives() == (Resources(),)
    assert JobFile().floor_nodes == 0
    assert PlanBlock(work="2h").work_s == {None: 7200.0}


def test_merged_keys_and_aliases() -> None:
    job = parse_job(
        "resources: &r {accelerators: A100:8}\nplan: {work: 1h}\nenvs: &e {A: '1'}\nsecrets: {<<: *e, B: yes}\n"
    )
    assert job.secrets == {"A": "1", "B": "yes"}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: a\nbudgett: 3", 2, "unknown key 'budgett'; did you mean 'budget'"),
        ("resources:\n  any_of:\n  - infra: aws\n    acelerators: x", 4, "did you mean 'accelerators'"),
        ("resources:\n  job_recovery:\n    strategi: x", 3, "did you mean 'strategy'"),
        ("checkpoint:\n  sizes: 1GiB", 2, "did you mean 'size'"),
        ("\n\nzebra: 1", 3, "unknown key 'zebra'; known here: budget, checkpoint"),
        ("plan:\n  work: fast", 2, "not a duration"),
        ("name: x\nresources:\n  accelerators: '8'", 3, "not an accelerator"),
        ("num_nodes: two", 1, "num_nodes: Expected `int`"),
        ("name: x\nnum_nodes: 0", 1, "num_nodes is 1 or more"),
        ("name: a\nname: b", 2, "'name' stands in line 1 already"),
        ("deadline: 2026-01-01", 1, "has no time"),
        ("deadline: 2026-01-01T00:00:00", 1, "has no time zone"),
        ("deadline: 0s", 1, "after the start"),
        ("budget: -3", 1, "not an amount"),
        ("checkpoint: some", 1, "some"),
        ("checkpoint:\n  size: 3 apples", 2, "checkpoint.size: not a size"),
        ("checkpoint:\n  bandwidth: 400", 2, "not a rate"),
        ("on_demand_floor: 3\nnum_nodes: 2", 1, "does not fit 2 machines"),
        ("resources:\n  any_of: [{cpus: 1}]\n  ordered: [{cpus: 1}]", 2, "exclude each other"),
        ("a: [", 1, "not YAML"),
        ("---\nname: a\n---\nname: b", 3, "not YAML"),
        ("[1, 2]", 1, "mapping"),
        ("? [a]\n: 1", 1, "a key is one word"),
        ("spot_policy: maybe", 1, "Invalid enum value 'maybe'"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_job(text, "job.yaml")
    message = str(caught.value)
    assert says in message
    # What msgspec finds about a whole section has the line at which the section begins.
    named = int(message.split("job.yaml, line ")[1].split(":")[0])
    assert named in (line, line - 1)


def test_bombs_are_refused() -> None:
    layers = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 9))
    with pytest.raises(UsageError, match="too large once its aliases are unfolded"):
        parse_job(f"x0: &x0 [a]\n{layers}\n")
    with pytest.raises(UsageError, match="too large"):
        parse_job("x: &a [*a]")
    with pytest.raises(UsageError, match="nested too deeply"):
        parse_job("[" * 100_000)
    with pytest.raises(UsageError, match="characters"):
        parse_job("# " + "x" * (1 << 20))


PIECES = [
    *("name", "plan", "envs", "resources", "any_of", "accelerators", "deadline", "A100:8", "1h", "2026-13-01", "9" * 9),
    *("[", "]", "{", "}", "~", "<<", "*a", "|", "? ", '"', ": ", "\n", "  ", "- ", "&a "),
    *("!!bool x", "!!timestamp x", "!!float .", "!!binary x"),
]


@given(st.text(max_size=100) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_a_job_or_a_usage_error(text: str) -> None:
    try:
        assert isinstance(parse_job(text), JobFile)
    except UsageError:
        pass


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    with pytest.raises(UsageError, match="cannot read the job file"):
        read_job(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_job(path)
    path.write_text("nam: x")
    with pytest.raises(UsageError, match=r"job\.yaml, line 1: unknown key 'nam'; did you mean 'name'"):
        read_job(path)
    assert read_job(Path(__file__).parents[2] / "examples" / "plan" / "job.yaml").resources.wanted == (
        Accelerator("A100", 8),
    )


def test_quantities() -> None:
    assert parse_dollars("$1,200.50") == 1200.5
    assert parse_rate("1 GB/s") == 1e9
    assert (parse_floor("25%", 5), parse_floor(2, 4), parse_floor("0%", 9)) == (2, 2, 0)
    moment = parse_deadline("2026-12-01T18:00:00+02:00")
    assert moment.at == datetime(2026, 12, 1, 16, tzinfo=UTC)
    assert moment.left_s(moment.at.timestamp() - 60) == 60
    with pytest.raises(UsageError, match="has passed"):
        moment.left_s(moment.at.timestamp() + 1)
    refused: tuple[object, ...] = (True, "nan", "1e12", [], -1)
    for wrong in refused:
        with pytest.raises(UsageError):
            parse_dollars(wrong)
