"""Choice by measurement: the table's file, the nearest point, and what `auto` then takes. Tables here are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import RUNNERS, graphs, topology_of
from torch._dynamo.testing import CompileCounterWithBackend

from fastmetro_kernels import topology_attention, tuning
from fastmetro_kernels.attention import dispatch, explain
from fastmetro_kernels.attention.configs import Config, TritonConfig
from fastmetro_kernels.tuning import Candidate, Family, Point, TuningFileError, choice, reader, table

RECORD = dict.fromkeys(reader.RECORD, "x")
WIDE = TritonConfig((Config(32, 32, 4, 1),))
PAIR = TritonConfig((Config(16, 32, 4, 1), Config(32, 16, 4, 1)), share=64)


def point(pass_name: str = "forward", vertices: int = 431, batch_heads: int = 8, **changed: Any) -> Point:
    config = WIDE if pass_name == "forward" else PAIR
    candidates = (Candidate("native", 2, 0.25), Candidate("triton", config, 0.5), Candidate("sdpa", None, 2.0))
    fields = {"element_size": 4, "dim": 16, "dtype": "float32", "candidates": candidates} | changed
    return Point(pass_name, vertices=vertices, batch_heads=batch_heads, **fields)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Gives a function that makes points the user's table of this device, which is then said to be one of a family."""

    def use(*points: Point) -> None:
        path = tmp_path / "tuned.json"
        table.write_file(path, {"9.0": Family(RECORD, points)})
        monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
        monkeypatch.setattr(choice, "family_of", lambda device: "9.0")
        tuning.reset()

    yield use
    monkeypatch.undo()
    tuning.reset()


# ---- the file -------------------------------------------------------------------------------------------------


def test_the_shipped_file_is_as_it_is_written() -> None:
    text = choice.SHIPPED.read_text()
    assert table.dump(table.parse(text, "attention.json")) == text


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuned.json"
    written = {"9.0": Family(RECORD, (point("backward"), point("forward", 1723))), "8.0": Family(RECORD)}
    table.write_file(path, written)
    assert table.read_file(path) == written
    assert [one.name for one in path.parent.iterdir()] == ["tuned.json"], "nothing else is left"


def test_writing_replaces_the_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    table.write_file(path, {"9.0": Family(RECORD, (point(),))})
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        table.write_file(path, {})
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_measured_again_replaces_the_case_only() -> None:
    old = {"9.0": Family(RECORD, (point(), point("forward", 1723))), "8.0": Family(RECORD, (point(),))}
    again = point(candidates=(Candidate("native", 0, 9.0),))
    found = table.merged(old, "9.0", RECORD | {"date": "today"}, [again])
    assert set(found["9.0"].points) == {again, point("forward", 1723)} and found["9.0"].record["date"] == "today"
    assert found["8.0"] == old["8.0"]


def changed(path: list[Any], value: Any) -> str:
    """A good file in which the value at that path is another one."""
    content = json.loads(table.dump({"9.0": Family(RECORD, (point(), point("backward")))}))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content)


POINT = ["families", "9.0", "points", 1]  # backward comes first in a file
CANDIDATE = [*POINT, "candidates"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.json is not JSON: .*accepted: what `tune` writes"),
        ("[" * 100_000, "is not JSON"),
        ("[]", r"the file is \[\]; accepted: an object"),
        (changed(["format"], 2), "format is 2; accepted: 1"),
        (changed(["format"], True), "format is True; accepted: 1"),
        (changed(["op"], "upsampling"), "op is 'upsampling'; accepted: 'attention'"),
        (changed(["more"], 1), r"the set of keys of the file is \['families', 'format', 'more', 'op'\]; accepted:"),
        (changed(["families", "sm_90"], {}), "a name of families is 'sm_90'; accepted: a compute capability, as '9.0'"),
        (changed(["families", "9.0", "record", "date"], 3), "record.date is 3; accepted: printable text"),
        (changed(["families", "9.0", "record", "device"], "\x1b[2J"), "accepted: printable text"),
        (changed(["families", "9.0", "points"], {}), r"points is {}; accepted: a list"),
        (changed([*POINT, "pass"], "both"), "points\\[1\\].pass is 'both'; accepted: 'forward', 'backward'"),
        (changed([*POINT, "bytes"], 8), "bytes is 8; accepted: 2, 4"),
        (changed([*POINT, "dim"], 24), "dim is 24; accepted: 16, 32, 64, 128"),
        (changed([*POINT, "dim"], [16]), r"dim is \[16\]; accepted: 16, 32, 64, 128"),
        (changed([*POINT, "vertices"], 0), "vertices is 0; accepted: an integer from 1 to"),
        (changed([*POINT, "vertices"], 2**31), "accepted: an integer from 1 to"),
        (changed([*POINT, "batch_heads"], 1.5), "batch_heads is 1.5; accepted: an integer"),
        (changed([*POINT, "dtype"], KeyError), r"the set of keys of families\['9.0'\].points\[1\] is"),
        (changed([*CANDIDATE, 0, "backend"], "os.system"), "backend is 'os.system'; accepted: 'native', 'triton'"),
        (changed([*CANDIDATE, 0, "ms"], float("nan")), "ms is nan; accepted: milliseconds, a finite number above 0"),
        (changed([*CANDIDATE, 0, "ms"], -1), "ms is -1; accepted"),
        (changed([*CANDIDATE, 0, "ms"], "1"), "ms is '1'; accepted"),
        (changed([*CANDIDATE, 0, "configuration"], {}), r"configuration is \[\]; accepted: steps_per_segment"),
        (changed([*CANDIDATE, 0, "configuration", "steps_per_segment"], -1), "steps_per_segment is -1; accepted"),
        (changed([*CANDIDATE, 1, "configuration", "tiles"], [[16, 64, 4]]), r"accepted: \[rows, keys, warps, stages\]"),
        (
            changed([*CANDIDATE, 1, "configuration", "tiles"], [[48, 64, 4, 1]]),
            "rows must be one of 16, 32, 64, got 48",
        ),
        (changed([*CANDIDATE, 1, "configuration", "tiles"], []), "forward has 1 kernels, got 0 tiles"),
        (changed([*CANDIDATE, 1, "configuration", "precision"], "tf32"), "precision must be one of ieee, tf32x3"),
        (changed([*CANDIDATE, 1, "configuration", "share"], 2**31 - 1), "share must be 0 to"),
        (changed(["families", "9.0", "points", 0, "pass"], "forward"), "configuration"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) and len(value) < 200 else "",
)
def test_malformed_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(TuningFileError, match=message) as error:
        table.read_file(path)
    assert str(error.value).startswith(str(path)), "the message names the file"
    assert len(str(error.value)) < 600


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TuningFileError, match=r"missing\.json: cannot be read: No such file"):
        table.read_file(tmp_path / "missing.json")
    with pytest.raises(TuningFileError, match="cannot be read"):
        table.read_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(TuningFileError, match="binary is not UTF-8"):
        table.read_file(tmp_path / "binary")
    monkeypatch.setattr(table, "LARGEST_FILE", 10)
    (tmp_path / "large").write_text(" " * 11)
    with pytest.raises(TuningFileError, match="large has more than 10 bytes"):
        table.read_file(tmp_path / "large")


def test_the_same_case_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningFileError, match="accepted: every case once"):
        table.parse(table.dump({"9.0": Family(RECORD, (point(), point()))}), "twice.json")


# ---- the lookup -----------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def marked(vertices: int, batch_heads: int, steps: int) -> Point:
    return point("forward", vertices, batch_heads, candidates=(Candidate("native", steps, 1.0),))


def looked_up(vertices: int, batch_heads: int, dim: int = 16, size: int = 4, pass_name: str = "forward") -> Any:
    found = choice.ranking(CPU, pass_name, size, dim, vertices, batch_heads)
    return found[0][1] if found else None


def test_the_nearest_point_in_the_logarithm(families: Any) -> None:
    families(marked(431, 8, 1), marked(431, 256, 2), marked(6890, 64, 3))
    assert looked_up(431, 8) == 1 and looked_up(1, 1) == 1 and looked_up(0, 0) == 1
    assert looked_up(431, 45) == 1 and looked_up(431, 46) == 2, "the border is sqrt(8 * 256) = 45.3"
    assert looked_up(431, 10**9) == 2
    assert looked_up(1723, 8) == 1 and looked_up(1724, 8) == 3, "the border is sqrt(431 * 6890) = 1723.3"
    assert looked_up(10**7, 1) == 3
    assert looked_up(431, 8, dim=9) == 1, "head dims are padded"
    for other in ({"dim": 17}, {"dim": 200}, {"size": 2}, {"size": 8}, {"pass_name": "backward"}):
        assert looked_up(431, 8, **other) is None, other


def test_yardsticks_are_never_chosen(families: Any) -> None:
    families(point(candidates=(Candidate("sdpa", None, 0.1), Candidate("triton", WIDE, 0.2))))
    assert [name for name, _ in choice.ranking(CPU, "forward", 4, 16, 431, 8)] == ["triton"]


def test_other_devices_have_no_table() -> None:
    assert choice.family_of(CPU) is None and choice.family_of(torch.device("meta")) is None
    assert looked_up(431, 8) is None


def test_a_users_file_that_is_malformed_stops_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
    tuning.reset()
    try:
        with pytest.raises(TuningFileError, match=r"mine\.json"):
            tuning.families()
    finally:
        monkeypatch.undo()
        tuning.reset()


# ---- what auto takes ------------------------------------------------------------------------------------------

TRITON = any(runner.backend == "triton" and runner.device == "cpu" for runner in RUNNERS)
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton's interpreter does not run here")


def tensors(batch: int = 1) -> tuple[Any, ...]:
    topology = topology_of(graphs()["mesh"])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, topology.num_tokens, 2, 16, generator=generator)
    return q, k, v, topology


@needs_triton
def test_each_pass_takes_its_own_winner(families: Any) -> None:
    slow_native = (Candidate("native", 0, 3.0), Candidate("triton", PAIR, 1.0))
    families(point("forward"), point("backward", candidates=slow_native))
    forward, backward = dispatch.choose("auto", *tensors())
    assert forward == ("native", 2)
    assert backward.backend == "triton" and choice.triton_config(backward.configuration) == PAIR


@needs_triton
def test_a_named_backend_runs_both_passes_with_its_fastest_configuration(families: Any) -> None:
    families(point("forward"), point("backward"))
    forward, backward = dispatch.choose("triton", *tensors())
    assert choice.triton_config(forward.configuration) == WIDE
    assert choice.triton_config(backward.configuration) == PAIR
    assert dispatch.choose("reference", *tensors()) == (("reference", None), ("reference", None))


def test_a_winner_that_cannot_is_skipped(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    families(point("forward", candidates=(Candidate("triton", WIDE, 0.1), Candidate("native", 4, 0.2))))
    monkeypatch.setattr(dispatch.backends, "triton_reasons", lambda device: ["not today"])
    assert dispatch.choose("auto", *tensors())[0] == ("native", 4)
    assert dispatch.choose("auto", *tensors())[1] == ("native", None), "not measured: the order"


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_passes_of_different_backends_give_one_gradient(families: Any, backend: str) -> None:
    mixed = (Candidate("triton", PAIR, 1.0), Candidate("native", 0, 3.0))
    families(point("forward"), point("backward", candidates=mixed))
    q, k, v, topology = tensors()
    found = []
    for name in (backend, "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = topology_attention(*leaves, topology, dropout_p=0.2, seed=3, return_lse=True, backend=name)
        found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_is_made_while_tracing(families: Any, dynamic: bool) -> None:
    """Batches that lie nearest to the same measured point share one compiled function."""
    families(*(marked(431, size, size) for size in (2, 2000)), point("backward"))
    q, k, v, topology = tensors(2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return topology_attention(q, k, v, topology)

    compiled = []
    for batch in (3, 5, 7) if dynamic else (3,):
        inputs = [x[:1].repeat(batch, 1, 1, 1).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        torch.testing.assert_close(out, topology_attention(*inputs, topology))
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), inputs))
        compiled.append(counter.frame_count)
    assert len(set(compiled)) == 1, "nothing is compiled anew for another batch"


# ---- explanations ---------------------------------------------------------------------------------------------


def test_explain_names_the_measurement(families: Any) -> None:
    families(point("forward"))
    found = explain(*tensors())
    forward, backward = found["forward"], found["backward"]
    assert forward.backend == "native" and forward.configuration == "2 steps per segment"
    assert "measured at 431 vertices, head dim 16, batch * heads 8, float32: native" in forward.reason
    assert "triton 32x32 4 warps 1 stages 0.5000 ms, sdpa 2.0000 ms" in forward.reason
    assert "no measurement of this device family and head dim: the order is native, reference" in backward.reason


def test_explain_without_a_table() -> None:
    found = explain(*tensors(), backend="reference")
    assert found["forward"].backend == found["backward"].backend == "reference"
    assert found["forward"].reason.startswith("reference was asked for by name; ")
