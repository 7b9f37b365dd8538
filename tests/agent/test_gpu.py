"""GPUs that come late, fall off the bus, or belong to a driver that hangs: the real ctypes code against a small NVML of our own.

It is compiled from C here and reads from a file what it shall say, so that a test can change its mind while the probe runs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agents import eventually, python, started

from holdfast.agent.gpu import MACHINE_XIDS, Gpus
from holdfast.agent.gpu_probe import KernelLog, xids_in
from holdfast.agent.restart import RunOptions, run_command
from holdfast.agent.rounds import Care
from holdfast.core.clock import SystemClock
from holdfast.core.events import CollectingSink
from holdfast.policy.restart import RestartLimits

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { void *device; unsigned long long type, data; unsigned gpu, compute; } event_t;
static int gpus, init_error, broken, error_code, xid, hang;
static int said_xid;
static void read_state(void) {
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (!file) { gpus = 0; return; }
    if (fscanf(file, "%d %d %d %d %d %d", &gpus, &init_error, &broken, &error_code, &xid, &hang) != 6) gpus = 0;
    fclose(file);
    if (hang) pause();
}
int nvmlInit_v2(void) { read_state(); return init_error; }
const char *nvmlErrorString(int code) {
    return code == 15 ? "GPU is lost" : code == 9 ? "Driver Not Loaded" : "Unknown Error";
}
int nvmlDeviceGetCount_v2(unsigned *count) { read_state(); *count = gpus; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return 0; }
static int of(void *device) { return (int)(long)device - 1 == broken ? error_code : 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-%04ld", (long)device - 1); return 0;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) { snprintf(text, length, "Fake H100"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = 80ULL << 30; return of(device);
}
int nvmlEventSetCreate(void **set) { *set = (void *)7L; return 0; }
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    return set == (void *)7L && types == 8 && device ? 0 : 2;
}
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout) {
    if (!xid || said_xid == xid) return 10;
    said_xid = xid;
    event->device = (void *)1L; event->type = 8; event->data = xid;
    return 0;
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    source = folder / "nvml.c"
    source.write_text(NVML)
    assert COMPILER is not None
    command = [COMPILER, "-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


class Machine:
    """What the driver of this machine says."""

    def __init__(self, library: Path, state: Path) -> None:
        self._state = state
        self.environment = dict(os.environ) | {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(state)}
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)
        self.says()

    def says(
        self, gpus: int = 2, *, init_error: int = 0, broken: int = -1, error: int = 15, xid: int = 0, hang: int = 0
    ) -> None:
        fresh = self._state.with_suffix(".new")
        fresh.write_text(f"{gpus} {init_error} {broken} {error} {xid} {hang}\n")
        fresh.replace(self._state)


@pytest.fixture
def machine(library: Path, tmp_path: Path) -> Machine:
    return Machine(library, tmp_path / "driver")


@contextmanager
def looking(machine: Machine, clock: SystemClock | None = None, **environment: str) -> Iterator[Gpus]:
    gpus = Gpus(clock or SystemClock(), environment=machine.environment | environment, interval_s=3600)
    try:
        yield gpus
    finally:
        gpus.close()


def ready(gpus: Gpus) -> None:
    def pause(seconds: float) -> bool:
        gpus.look(ask_s=seconds)
        return True

    assert gpus.wait_until_ready(60, pause) is None
    gpus.attempt_starts()


def trouble(gpus: Gpus) -> str:
    found: list[str] = []

    def look() -> bool:
        words = gpus.trouble(fresh=True)
        found.extend([words] if words else [])
        return bool(words)

    eventually(look)
    return found[0]


@needs_compiler
def test_a_healthy_machine_is_ready_and_described(machine: Machine) -> None:
    with looking(machine) as gpus:
        ready(gpus)
        assert gpus.describe() == "2 x Fake H100 80 GiB"
        assert gpus.trouble(fresh=True) is None


@needs_compiler
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"broken": 1}, "GPU GPU-0001 is lost: nvmlDeviceGetMemoryInfo: GPU is lost (15)"),
        ({"gpus": 1}, "GPU GPU-0001 is lost: it is not listed any more"),
        ({"xid": 79}, "Xid 79 (GPU has fallen off the bus)"),
    ],
)
def test_a_lost_gpu_is_the_machines_failure(machine: Machine, change: dict[str, int], words: str) -> None:
    with looking(machine) as gpus:
        ready(gpus)
        machine.says(**change)
        assert trouble(gpus) == words
        machine.says()
        gpus.look(ask_s=60)
        gpus.attempt_starts()
        assert gpus.trouble(fresh=True) is None, "an attempt is not blamed for what was before it"


@needs_compiler
@pytest.mark.parametrize("xid", [13, 31, 43, 45])
def test_an_xid_that_a_program_causes_is_not(machine: Machine, xid: int) -> None:
    assert xid not in MACHINE_XIDS
    with looking(machine) as gpus:
        ready(gpus)
        machine.says(xid=xid)
        assert gpus.trouble(fresh=True) is None
        assert gpus.trouble(fresh=True) is None


@needs_compiler
def test_other_peoples_gpus_are_not_looked_at(machine: Machine) -> None:
    machine.says(gpus=4)
    for visible in ("0,1", "GPU-0000,GPU-0001"):
        with looking(machine, CUDA_VISIBLE_DEVICES=visible) as gpus:
            ready(gpus)
            machine.says(gpus=4, broken=3, xid=79)
            assert gpus.trouble(fresh=True) is None
            machine.says(gpus=4, broken=1)
            assert trouble(gpus).startswith("GPU GPU-0001 is lost")
            machine.says(gpus=4)


@needs_compiler
def test_a_driver_that_does_not_answer_is_found_and_does_not_hold_up_the_agent(machine: Machine) -> None:
    class Jumping(SystemClock):
        ahead_s = 0.0

        def monotonic_s(self) -> float:
            return super().monotonic_s() + self.ahead_s

    clock = Jumping()
    with looking(machine, clock) as gpus:
        ready(gpus)
        machine.says(hang=1)
        assert gpus.trouble(fresh=True) is None
        clock.ahead_s = 200
        assert str(gpus.trouble()).startswith("the GPU driver has not answered for 3 min")


@needs_compiler
def test_a_probe_that_is_killed_is_started_again(machine: Machine) -> None:
    with looking(machine) as gpus:
        ready(gpus)
        gpus._process.kill()
        gpus._process.wait()
        machine.says(broken=0)
        assert trouble(gpus).startswith("GPU GPU-0000 is lost")


def pauses(deeds: list[Callable[[], None]]) -> Callable[[float], bool]:
    """One deed per pause; the agent is told to stop when there is none left."""

    def pause(seconds: float) -> bool:
        if deeds:
            deeds.pop(0)()
            return True
        return False

    return pause


@needs_compiler
def test_waiting_ends_when_the_gpu_comes_with_the_limit_or_when_the_agent_shall_stop(machine: Machine) -> None:
    machine.says(init_error=9)
    with looking(machine) as gpus:
        gpus.look(ask_s=60)
        come = [lambda: None, lambda: machine.says(2, broken=0), lambda: gpus.look(ask_s=60), machine.says]
        come += [lambda: gpus.look(ask_s=60)] * 3
        assert gpus.wait_until_ready(3600, pauses(come)) is None
        assert come
        machine.says(0)
        gpus.look(ask_s=60)
        assert gpus.wait_until_ready(0, pauses([])) == (
            "no usable GPU within 0 s: the driver works, but there is no GPU"
        )
        assert gpus.wait_until_ready(3600, pauses([])) is not None


def test_without_nvml_nvidia_smi_is_asked(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncat "$SMI_SAYS"\nexit "$(cat "$SMI_CODE")"\n',
    )
    smi.chmod(0o755)
    says, code = tmp_path / "says", tmp_path / "code"
    says.write_text("0, GPU-aa, Fake A100, 40960\n1, GPU-bb, Fake A100, 40960\n")
    code.write_text("0")
    path = f"{tmp_path}:/usr/bin:/bin"
    environment = {"PATH": path, "SMI_SAYS": str(says), "SMI_CODE": str(code)}
    gpus = Gpus(SystemClock(), environment=environment, interval_s=3600)
    try:
        ready(gpus)
        assert gpus.describe() == "2 x Fake A100 40 GiB"
        says.write_text("0, GPU-aa, Fake A100, 40960\n1, [GPU is lost], [GPU is lost], [GPU is lost]\n")
        code.write_text("15")
        assert trouble(gpus).startswith("the GPU driver fails: nvidia-smi failed with exit code 15")
    finally:
        gpus.close()
    nothing = Gpus(SystemClock(), environment={"PATH": "/nonexistent"}, interval_s=3600)
    try:
        assert nothing.wait_until_ready(60, pauses([lambda: nothing.look(ask_s=60)])) == (
            "no usable GPU within 1 min: no NVIDIA driver: neither libnvidia-ml.so.1 nor nvidia-smi was found"
        )
    finally:
        nothing.close()


def test_xids_are_read_from_the_kernels_words(tmp_path: Path) -> None:
    assert xids_in("NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\nNVRM: loading\n") == [79]
    log = tmp_path / "kmsg"
    log.write_text("4,1,1,-;NVRM: Xid (PCI:0000:3b:00): 48, old news\n")
    kernel = KernelLog(str(log))
    assert kernel.xids() == []
    with log.open("a") as file:
        file.write("4,2,2,-;NVRM: Xid (PCI:0000:3b:00): 94, pid=7\n")
    assert kernel.xids() == [94]
    assert KernelLog(str(tmp_path / "nothing")).xids() == []


def test_the_probe_needs_nothing_but_the_standard_library_and_ends_with_its_input() -> None:
    from holdfast.agent import gpu_probe

    command = [sys.executable, "-I", "-S", gpu_probe.__file__, "3600"]
    done = subprocess.run(command, input=b"", capture_output=True, env={"PATH": "/nonexistent"}, timeout=60, check=True)
    assert set(json.loads(done.stdout)) == {"gpus", "error", "xids"}


@needs_compiler
def test_a_machine_without_a_gpu_fails_as_a_machine_and_the_command_is_never_started(
    machine: Machine, tmp_path: Path
) -> None:
    machine.says(init_error=9)
    touched = tmp_path / "touched"
    options = ["--wait-gpu", "--wait-gpu-limit", "0 s", "--"]
    with started(*options, "touch", str(touched), env=machine.environment) as agent:
        stderr = agent.communicate(timeout=60)[1].decode()
    assert agent.returncode == 69
    assert "the command was not started; the machine has failed: no usable GPU within 0 s" in stderr
    assert not touched.exists()


@needs_compiler
def test_a_gpu_that_is_lost_while_training_costs_no_error_and_the_next_start_waits_for_it(machine: Machine) -> None:
    """The command dies of it itself, before anybody has looked; then the GPU comes back."""
    lost, back = "2 0 1 15 0 0", "2 0 -1 15 0 0"
    state = machine.environment["FAKE_NVML"]
    code = f"""
attempt = int(os.environ["HOLDFAST_ATTEMPT"])
if attempt == 1:
    open({state!r}, "w").write({lost!r})
    raise RuntimeError("CUDA error: unspecified launch failure")
"""
    sink, lines = CollectingSink(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        Path(state).write_text(back)

    exit_code = run_command(
        python(code),
        RunOptions(limits=RestartLimits(first_delay_s=0, max_delay_s=0, max_errors=0), care=Care(wait_gpu_s=60)),
        clock=SystemClock(),
        sink=sink,
        say=say,
        rng=random.Random(1),
        environment=machine.environment,
    )
    assert exit_code == 0
    assert [event.fields["ending"] for event in sink.named("attempt.ended")] == ["infrastructure", "done"]
    assert "the machine has failed: GPU GPU-0001 is lost" in lines[0]
