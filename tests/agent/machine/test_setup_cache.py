"""A set-up that is run once and put in place on the next machines: the same files, nothing else, or it is run again."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from agents import GIVE_UP_S, eventually, kept_output
from hypothesis import given
from hypothesis import strategies as st
from real import Place, environment_of, packed

from holdfast.agent.machine import setup_archive, setup_cache
from holdfast.agent.machine.changes import Surroundings, changes, list_tree, usual_surroundings
from holdfast.agent.machine.setup_archive import Uncacheable, _Pieces, pack, put_in_place, unpack
from holdfast.agent.machine.setup_cache import SetupCache, SetupRecord, record_key
from holdfast.core.errors import FormatError
from holdfast.core.job_record import JobRecord, PackedCode
from holdfast.core.jobfile import parse_job
from holdfast.core.sealed import seal, unseal
from holdfast.store.base import Store
from holdfast.store.memory import MemoryStore
from holdfast.testing.clock import ManualClock
from holdfast.testing.faulty_store import Fault, FaultyStore, always

NOWHERE = Surroundings(packages=(), folders=(), trees=(), own=())


def no_tick() -> None:
    """Always wanted."""


class Bench:
    """A machine in a folder; its set-ups are shell texts that are run in the working folder."""

    def __init__(
        self,
        root: Path,
        store: Store,
        *,
        surroundings: Surroundings = NOWHERE,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.store, self.said = root, store, list[str]()
        self.surroundings, self.secrets = surroundings, dict(secrets or {})
        self.tick: Callable[[], None] = no_tick

    def begin(self) -> None:
        """A fresh machine with the same folder's name."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name, body in (("work/code.py", "print(1)"), ("venv/lib/old.py", "old"), ("venv/lib/unused.py", "unused")):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(body)
        (self.root / "venv" / "lib64").symlink_to("lib")

    def prepare(self, setup: str, **fields: Any) -> bool:
        """Whether it was taken from the cache."""
        self.begin()
        job = JobRecord(format=1, nonce="n", name="j", run="true", setup=setup, setup_cache=True, **fields)
        cache = SetupCache(
            job, self.store, self.root, os.environ, machine="m", clock=ManualClock(), tick=self.tick, say=self.said.append,
            trees={"work": self.root / "work", "venv": self.root / "venv"}, surroundings=self.surroundings,
        )  # fmt: skip
        if cache.restore():
            assert not [path for path in self.root.iterdir() if path.name.startswith("setup.")]
            return True
        cache.look_around()
        subprocess.run(["bash", "-ec", setup], cwd=self.root / "work", check=True)
        cache.keep(self.secrets)
        if cache._sender is not None:
            cache._sender.join(GIVE_UP_S)
        assert not (self.root / "setup.tar").exists()
        return False

    def state(self) -> dict[str, tuple[str, str, int]]:
        """Kind, content and mode of all that is there."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if path.is_symlink():
                found[str(path)] = ("l", os.readlink(path), mode)
            elif path.is_dir():
                found[str(path)] = ("d", "", mode)
            else:
                found[str(path)] = ("f", path.read_bytes().hex(), mode)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "machine", MemoryStore())


MUCH = r"""
mkdir -p built/deep ../venv/bin empty; chmod 700 empty
echo tool > ../venv/bin/tool; chmod 755 ../venv/bin/tool
printf '\x00\xff' > built/deep/binary; ln built/deep/binary built/second-name
ln -s deep/binary built/link; ln -s /usr ../venv/bin/out; ln -s nothing-here built/dangling
echo changed > ../venv/lib/old.py; rm ../venv/lib/unused.py
rm code.py; mkdir code.py; echo x > code.py/part
ln -s ../venv/bin/tool tool
"""


def test_another_machine_gets_the_same_files_links_modes_and_times(bench: Bench) -> None:
    assert not bench.prepare(MUCH)
    made, times = bench.state(), (bench.root / "work/built/deep/binary").stat().st_mtime
    assert any("is cached for the next machines" in line for line in bench.said)
    assert bench.prepare(MUCH)
    assert bench.state() == made
    assert (bench.root / "work/built/deep/binary").stat().st_mtime == pytest.approx(times, abs=1e-3)
    assert any("taken from the cache, as m has left it" in line for line in bench.said)


def test_what_was_there_before_stays_older_than_what_was_made_of_it(bench: Bench) -> None:
    setup = "cp code.py made"
    bench.begin()
    assert not bench.prepare(setup)
    assert bench.prepare(setup)
    work = bench.root / "work"
    # The imagined clock stands far back; a file that was made keeps the time of its machine.
    assert (work / "code.py").stat().st_mtime < (work / "made").stat().st_mtime


def test_another_text_code_variable_or_place_is_another_set_up(bench: Bench, tmp_path: Path) -> None:
    assert not bench.prepare("echo 1 > one")
    assert bench.prepare("echo 1 > one")
    assert not bench.prepare("echo 1  > one")
    assert not bench.prepare("echo 1 > one", envs={"A": "b"})
    assert not bench.prepare("echo 1 > one", secrets={"A": "file:/x"})
    assert bench.prepare("echo 1 > one", secrets={"A": "file:/y"}), "where a secret comes from is no matter"
    assert not bench.prepare("echo 1 > one", code=PackedCode(digest="0" * 64, size_bytes=1))
    assert not Bench(tmp_path / "elsewhere", bench.store).prepare("echo 1 > one")


@pytest.mark.parametrize("what", ["packages", "etc", "removed", "home", "folder"])
def test_a_set_up_that_changes_the_rest_of_the_machine_is_not_cached(tmp_path: Path, what: str) -> None:
    for name in ("var/status", "etc/conf/old", "home/.cache/pip/x", "usr/old"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    around = Surroundings(
        packages=[tmp_path / "var/status", tmp_path / "var/absent"], folders=[tmp_path / "usr"],
        trees=[tmp_path / "etc", tmp_path / "home"], own=[tmp_path / "home/.cache/pip"],
    )  # fmt: skip
    harm = {
        "packages": f"echo more >> {tmp_path}/var/status", "etc": f"echo y > {tmp_path}/etc/conf/old",
        "removed": f"rm {tmp_path}/etc/conf/old", "home": f"touch {tmp_path}/home/.condarc", "folder": f"touch {tmp_path}/usr/new",
    }[what]  # fmt: skip
    bench = Bench(tmp_path / "machine", MemoryStore(), surroundings=around)
    harmless = f"echo y > {tmp_path}/home/.cache/pip/x; echo z > z"
    assert not bench.prepare(harmless)
    assert bench.prepare(harmless)
    bench.said.clear()
    assert not bench.prepare(harm)
    assert ["is not cached: it has" in line for line in bench.said] == [True], bench.said
    assert len(list(bench.store.list("code/"))) == 2


@pytest.mark.parametrize(
    "leak",
    [
        "printf %s 'ca+na/ry-5f2b' > token", "printf 'https://u:%s@host' 'ca%2Bna%2Fry-5f2b' > ../venv/pip.conf",
        "printf %s 'ca+na/ry-5f2b' | base64 > auth", "head -c 1048570 /dev/zero > pad; printf %s 'ca+na/ry-5f2b' >> pad",
        "mkdir 'ca+na'; touch 'ca+na/ry-5f2b'", "ln -s 'ca+na/ry-5f2b' link",
    ],
)  # fmt: skip
def test_a_secret_in_what_was_made_keeps_it_out_of_the_store(tmp_path: Path, leak: str) -> None:
    bench = Bench(tmp_path / "machine", MemoryStore(), secrets={"TOKEN": "ca+na/ry-5f2b", "OTHER": "quite-another"})
    for _ in range(2):
        assert not bench.prepare(leak)
    assert (
        bench.said == ["holdfast: the set-up is not cached: the value of secret TOKEN stands in what it has made"] * 2
    )
    assert not list(bench.store.list())


def test_a_secret_is_found_wherever_the_archive_is_cut() -> None:
    data = b"...ca+na/ry-5f2b..."
    for one in range(len(data) + 1):
        for other in range(one, len(data) + 1):
            pieces = _Pieces(io.BytesIO(), {"SHORT": "xy", "TOKEN": "ca+na/ry-5f2b"}, no_tick)
            with pytest.raises(Uncacheable, match="TOKEN"):
                list(map(pieces.write, (data[:one], data[one:other], data[other:])))


def test_what_is_too_large_or_no_plain_file_is_not_cached(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not bench.prepare("mkfifo pipe")
    assert "no plain file" in bench.said[-1]
    monkeypatch.setattr(setup_archive, "MOST_BYTES", 100_000)
    assert not bench.prepare("head -c 200000 /dev/zero > large")
    assert "more than 97.7 KiB" in bench.said[-1], bench.said
    assert not list(bench.store.list())


def altered(store: Store, key: str, how: Callable[[bytes], bytes]) -> None:
    body = how(store.get(key, max_bytes=1 << 30))
    store.delete(key)
    if body:
        store.put(key, body)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "record flipped", "another's record"])
def test_what_is_not_as_it_was_packed_is_not_put_in_place(
    bench: Bench, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_archive, "PIECE_BYTES", 5_000)
    setup = "head -c 30000 /dev/urandom > large; rm ../venv/lib/unused.py; echo run >> ../../runs"
    assert not bench.prepare(setup)
    pieces = [entry.key for entry in bench.store.list("code/") if entry.key.endswith(".setup")]
    (record,) = [entry.key for entry in bench.store.list("code/") if "setup-" in entry.key]
    assert len(pieces) >= 6
    last = pieces[len(pieces) // 2]
    if harm == "flipped":
        altered(bench.store, last, lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    elif harm == "cut":
        altered(bench.store, last, lambda body: body[:100])
    elif harm == "gone":
        altered(bench.store, last, lambda body: b"")
    elif harm == "record flipped":
        altered(bench.store, record, lambda body: body.replace(b'"machine":"m"', b'"machine":"n"'))
    else:
        found = unseal(bench.store.get(record, max_bytes=1 << 20), SetupRecord, what="record")
        altered(bench.store, record, lambda body: seal(SetupRecord(**{**_fields(found), "key": "0" * 64})))
    assert not bench.prepare(setup)
    assert any("the cached set-up cannot be used, so it is run here" in line for line in bench.said)
    assert (bench.root.parent / "runs").read_text() == "run\nrun\n"


def _fields(record: SetupRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


@pytest.mark.parametrize("fault", [Fault.DENIED, Fault.UNAVAILABLE_BEFORE, Fault.FULL])
def test_a_store_that_does_not_take_it_costs_nothing_but_the_cache(tmp_path: Path, fault: Fault) -> None:
    store = FaultyStore(MemoryStore(), always(fault, "put_new"))
    bench = Bench(tmp_path / "machine", store)
    assert not bench.prepare("echo 1 > one")
    assert "is not cached" in bench.said[-1]
    store.plan = always(Fault.UNAVAILABLE_BEFORE, "get")
    assert not bench.prepare("echo 1 > one")


def test_who_is_not_wanted_any_more_does_not_wait_for_a_request_that_hangs(bench: Bench) -> None:
    class Unwanted(Exception):
        pass

    hangs, released = threading.Event(), threading.Event()

    class Hanging(FaultyStore):
        def get(self, key: str, *, max_bytes: int) -> bytes:
            if key.endswith(".setup"):
                hangs.set()
                assert released.wait(GIVE_UP_S)
            return super().get(key, max_bytes=max_bytes)

    def tick() -> None:
        if hangs.is_set():
            raise Unwanted

    assert not bench.prepare("echo 1 > one")
    bench.store, bench.tick = Hanging(bench.store), tick
    with pytest.raises(Unwanted):
        bench.prepare("echo 1 > one")
    assert not released.is_set()
    released.set()
    assert not (bench.root / "setup.got").exists()


def test_of_two_machines_at_once_the_first_record_stands(bench: Bench, tmp_path: Path) -> None:
    """Both have made something else: what the third gets is all of one of them."""
    setup = "cat ../../which > a; cat ../../which > b"
    which = tmp_path / "which"
    found: dict[str, bytes] = {}
    for name in ("one", "two"):
        which.write_text(name)
        first = Bench(bench.root, MemoryStore())
        assert not first.prepare(setup)
        found |= {
            entry.key: first.store.get(entry.key, max_bytes=1 << 20) for entry in first.store.list() if name == "two"
        }
        for entry in list(first.store.list()):
            bench.store.put_new(entry.key, first.store.get(entry.key, max_bytes=1 << 20))
    assert bench.prepare(setup)
    assert (bench.root / "work/a").read_text() == (bench.root / "work/b").read_text() == "one"


# The archive, from a hostile hand.

FILE, FOLDER, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE
names = st.lists(
    st.sampled_from(["work", "venv", "lib", "lib64", "out", "..", "code.py", ""]), min_size=1, max_size=4
).map("/".join)
members = st.lists(
    st.tuples(names, st.sampled_from([FILE, FOLDER, LINK, tarfile.LNKTYPE, tarfile.FIFOTYPE]), names), max_size=6
)


@given(members, st.lists(names, max_size=3), st.integers(0, 9000) | st.none())
def test_whatever_stands_in_an_archive_nothing_is_touched_outside_of_the_trees(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, str]], gone: list[str], cut: int | None
) -> None:
    root = tmp_path_factory.mktemp("hostile")
    bench = Bench(root / "machine", MemoryStore())
    bench.begin()
    (root / "outside").mkdir()
    (root / "outside" / "code.py").write_text("precious")
    (bench.root / "work" / "lib").symlink_to(root / "outside")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o6777
            if kind in (LINK, tarfile.LNKTYPE):
                member.linkname = text
            elif kind == FILE:
                member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    (bench.root / "setup.tar").write_bytes(buffer.getvalue()[:cut])
    trees = {"work": bench.root / "work", "venv": bench.root / "venv"}
    before = {path: path.read_bytes() for path in bench.root.rglob("*.py") if path.is_file()}
    removed = {"work": frozenset(gone), "venv": frozenset(gone)}
    try:
        unpacked = unpack(bench.root / "setup.tar", trees, removed, bench.root / "setup.new", no_tick)
    except (FormatError, OSError):
        assert before == {path: path.read_bytes() for path in before}, "refused before anything is touched"
    else:
        try:
            put_in_place(unpacked, trees, removed)
        except (FormatError, OSError):
            pass
        for path in bench.root.rglob("*"):
            assert path.is_symlink() or path.lstat().st_mode & 0o6000 == 0
    assert sorted(path.name for path in root.iterdir()) == ["machine", "outside"]
    assert {path.name: path.read_text() for path in (root / "outside").iterdir()} == {"code.py": "precious"}
    assert {path.name for path in bench.root.iterdir()} <= {"work", "venv", "setup.tar", "setup.new"}


def test_a_link_to_what_this_machine_does_not_have_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    setup = f"ln -s {tmp_path}/there link; echo run >> ../../runs"
    assert not bench.prepare(setup)
    assert bench.prepare(setup)
    (tmp_path / "there").unlink()
    assert not bench.prepare(setup)
    assert "which is not here" in bench.said[-1]
    assert (tmp_path / "runs").read_text() == "run\nrun\n"


trees = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join),
    st.sampled_from(["f1", "f2", "d", "l1", "l2"]), max_size=6,
)  # fmt: skip


def plant(root: Path, tree: Mapping[str, str]) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, kind in sorted(tree.items()):
        path = root / name
        if any(parent.is_symlink() or parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "d":
            path.mkdir(exist_ok=True)
        elif not path.exists() and not path.is_symlink():
            path.write_text(kind) if kind[0] == "f" else path.symlink_to(kind)


@given(trees, trees)
def test_from_any_tree_to_any_other(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, str], other: dict[str, str]
) -> None:
    root = tmp_path_factory.mktemp("trees")
    first, second = root / "first", root / "second"
    plant(first, one)
    plant(second, one)
    before = list_tree(first, no_tick)
    plant(first, other)
    found = changes(before, list_tree(first, no_tick))
    pack({"t": first}, {"t": found}, root / "tar", {}, no_tick)
    gone = {"t": frozenset(found.gone)}
    put_in_place(unpack(root / "tar", {"t": second}, gone, root / "new", no_tick), {"t": second}, gone)

    def state(tree: Path) -> dict[str, str]:
        return {
            str(path.relative_to(tree)): f"l{os.readlink(path)}"
            if path.is_symlink()
            else "d"
            if path.is_dir()
            else path.read_text()
            for path in tree.rglob("*")
        }

    assert state(second) == state(first)


def test_the_job_file_asks_for_it_and_a_usual_machine_is_looked_at_where_set_ups_write(tmp_path: Path) -> None:
    assert parse_job("run: x\nsetup: y\nsetup_cache: true").setup_cache
    assert not parse_job("run: x").setup_cache
    around = usual_surroundings({"HOME": "/root"}, [tmp_path])
    assert {"/etc", "/opt", "/usr/local", "/root"} <= set(map(str, around.trees))
    assert Path("/root/.cache/pip") in around.own
    assert usual_surroundings({"HOME": str(tmp_path / "home")}, [tmp_path]).trees, (
        "what is the machine's own is no surrounding"
    )


# As a process, with a real installation.


def wheel() -> bytes:
    """A package named tiny, with a program."""
    buffer, info = io.BytesIO(), "tiny-1.0.dist-info"
    files = {
        "tiny.py": "def main():\n    print('tiny is here')\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def boot(place: Place) -> dict[str, str]:
    """A fresh machine: its environment as the bootstrap makes it, in the place where every machine has it."""
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place.folder / "venv"], check=True)
    packages = next((place.folder / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "image.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    home = place.root / "home"
    home.mkdir(exist_ok=True)
    return environment_of(place, HOME=str(home), PYTHONDONTWRITEBYTECODE="1")


def run_machine(place: Place, launch: int) -> tuple[str, str]:
    """What launch number `launch` writes."""
    environment = boot(place)
    command = [
        str(place.folder / "venv/bin/python"),
        "-m",
        "holdfast",
        "machine",
        "--run",
        str(place.run),
        "--launch",
        str(launch),
    ]
    process = subprocess.Popen(
        [*command, "--end-command", place.end_command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    timer = threading.Timer(GIVE_UP_S, process.kill)
    timer.start()
    try:
        out, err = process.communicate()
    finally:
        timer.cancel()
    assert process.returncode == 0, err
    return out, err


def test_a_second_machine_does_not_install_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    code = PackedCode(**packed(place, {"tiny-1.0-py3-none-any.whl": wheel()}))  # type: ignore[arg-type]
    install = "python -m pip install -q --no-index --disable-pip-version-check ./tiny-1.0-py3-none-any.whl"
    setup = f"{install}\necho once >> {tmp_path}/runs"
    cached = f"while ! ls {place.run}/code/setup-* >/dev/null 2>&1; do sleep 0.05; done"
    place.ready(
        f"tiny\npython -c 'import tiny; print(tiny.__file__)'\n{cached}", code=code, setup=setup, setup_cache=True
    )
    for launch in (1, 2):
        if launch == 2:
            place.controller.intent(2)
            place.controller.grant(2, 0, 3600)
            place.controller.answer(2)
        out, err = run_machine(place, launch)
        assert out.splitlines()[0] == "tiny is here", err
        assert str(place.folder / "venv") in out.splitlines()[1]
    assert (tmp_path / "runs").read_text() == "once\n", "the second one has not run it"
    eventually(lambda: b"set-up taken from the cache, as machine-1 has left it" in kept_output(place.run))
    assert len([path for path in (place.run / "code").iterdir() if path.name.startswith("setup-")]) == 1
    assert record_key("x") == "code/setup-x"
    assert setup_cache.PIECE_BYTES == 64 << 20
