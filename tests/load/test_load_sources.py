"""The forms of --model SOURCE: folders, pkg:, module:, and what plugins load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bert
from torch import nn

from qconvert.errors import InputError
from qconvert.ir.model import Model
from qconvert.load import load
from qconvert.load.factory import MemorySource, _skeleton


def no_plugin(source: str) -> Model | None:
    return None


def rejected(source: object, code: str) -> str:
    with pytest.raises(InputError) as caught:
        load(str(source), no_plugin)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value.message


# Which loader


def test_a_plugin_is_asked_first_and_may_take_the_source(tmp_path: Path) -> None:
    taken = load(str(tiny_bert(tmp_path)), no_plugin)
    assert load("anything://x", lambda source: taken) is taken


def test_a_folder_that_no_plugin_takes_is_a_hugging_face_folder(tmp_path: Path) -> None:
    assert load(str(tiny_bert(tmp_path)), no_plugin).task.name == "encoder"


@pytest.mark.parametrize("source", ["", " ", "a\0b"], ids=ascii)
def test_no_source(source: str) -> None:
    rejected(source, "QC-INPUT-001")


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "'nobody/nothing' does not exist" in rejected("nobody/nothing", "QC-INPUT-001")


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        ("model.gguf", "QC-INPUT-002", "qconvert-gguf"),
        ("model.safetensors", "QC-INPUT-002", "config.json"),
        ("model.txt", "QC-INPUT-002", "plugin"),
        ("model.pt", "QC-INPUT-003", "module:FACTORY"),
    ],
)
def test_a_file_gets_the_hint_that_fits_it(tmp_path: Path, name: str, code: str, hint: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        load(str(tmp_path / name), no_plugin)
    assert caught.value.code == code
    assert name in caught.value.message
    assert hint in caught.value.hint


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "no config.json" in rejected(tmp_path, "QC-INPUT-002")


def test_a_folder_that_can_not_be_read_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert(tmp_path)

    def denied(path: Path, mode: str = "r") -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in rejected(tmp_path, "QC-INPUT-019")


# pkg:


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `weights_of_x` that must never be imported, with a checkpoint inside."""
    folder = tmp_path / "site" / "weights_of_x"
    tiny_bert(folder / "data" / "bert")
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "data" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.mark.parametrize("source", ["pkg:weights_of_x/data/bert", "pkg:weights_of_x.data/bert"])
def test_a_path_in_a_package_is_found_without_importing_it(package: Path, source: str) -> None:
    assert load(source, no_plugin).name == "bert"
    assert not any(name.startswith("weights_of_x") for name in sys.modules)


def test_plugins_see_the_resolved_path(package: Path) -> None:
    asked: list[str] = []
    load("pkg:weights_of_x/data/bert", lambda source: asked.append(source))
    assert asked == [str(package / "data" / "bert")]


@pytest.mark.parametrize("path", ["../secret", "data/../../secret", "//etc"])
def test_a_path_in_a_package_can_not_leave_it(package: Path, path: str) -> None:
    (package.parent / "secret").mkdir()
    assert "leads out" in rejected(f"pkg:weights_of_x/{path}", "QC-INPUT-009")


def test_a_path_that_the_package_lacks_is_named(package: Path) -> None:
    message = rejected("pkg:weights_of_x/data/llama", "QC-INPUT-001")
    assert "'data/llama'" in message
    assert str(package) in message


@pytest.mark.parametrize("source", ["pkg:", "pkg:/x", "pkg:a-b/x", "pkg:no_such_package_at_all/x", "pkg:__main__/x"])
def test_a_package_that_is_not_there(source: str) -> None:
    assert source in rejected(source, "QC-INPUT-020")


# module:

FACTORIES = '''
import torch
from torch import nn

class Tied(nn.Module):
    """Tied parameters, shared storage, a transposed weight, float16 and bfloat16, a scalar and nothing at all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.view = nn.Parameter(self.first.weight.detach())
        self.transposed = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)
        self.float16 = nn.Parameter(torch.ones(2, dtype=torch.float16))
        self.bfloat16_ = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.also_empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("table", torch.ones(3, dtype=torch.float64))
        self.register_buffer("hidden", torch.ones(3), persistent=False)

    def forward(self, x, mask=None):
        return self.second(self.first(x))

made = Tied().train()

def good(): return made, (torch.ones(5, 4), torch.ones(5, 4))
def one(): return made, torch.ones(5, 4)
def named(): return made, {"mask": torch.ones(5, 4), "x": torch.ones(5, 4)}
def raises(): raise ValueError("no weights here")
def exits(): raise SystemExit("gone")
def large(): raise MemoryError("8 GiB")
def nothing(): return None
def module_only(): return made
def no_inputs(): return made, ()
def too_many(): return made, (torch.ones(5, 4),) * 3
def unknown_name(): return made, {"y": torch.ones(5, 4)}
def no_tensor(): return made, ([1, 2],)
def scalars_only(): return made, (torch.tensor(1.0),)
def uneven(): return made, (torch.ones(5, 4), torch.ones(6, 4))
def no_rows(): return made, torch.ones(0, 4)
def compiled(): return torch.compile(nn.Linear(2, 2)), torch.ones(1, 2)
def parallel(): return nn.DataParallel(nn.Linear(2, 2)), torch.ones(1, 2)
def on_meta(): return nn.Linear(2, 2, device="meta"), torch.ones(1, 2)
constant = 3
'''


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory; its name is its own in every test, as imports are remembered."""
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return name


@pytest.mark.parametrize("form", ["module:{}:good", "module:{}.good", "module:{}.py:good", "module:./{}.py:good"])
def test_every_form_of_a_factory(factories: str, form: str) -> None:
    model = load(form.format(factories), no_plugin)
    assert model.task.name == "module"
    assert model.name == "Tied"
    assert model.blocks == ()
    assert list(model.input_files) == [f"{factories}.py", "state_dict"]


@pytest.mark.parametrize(("function", "names"), [("good", ("x", "mask")), ("one", ("x",)), ("named", ("mask", "x"))])
def test_example_inputs_have_the_names_of_forward(factories: str, function: str, names: tuple[str, ...]) -> None:
    model = load(f"module:{factories}:{function}", no_plugin)
    assert model.input_names == names
    assert tuple(model.example_inputs) == names


def test_a_factory_leaves_the_process_as_it_was(factories: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / f"{factories}.py").open("a") as code:
        code.write("torch.set_default_dtype(torch.float16)\ndef failing(): torch.set_grad_enabled(False); raise KeyError\n")
    gradients = torch.is_grad_enabled()
    load(f"module:{factories}:good", no_plugin)
    assert torch.get_default_dtype() is torch.float32
    said = "changed what belongs to the whole process, and is put back: torch's default dtype"
    assert caplog.messages == [f"module:{factories}:good {said}"]
    with pytest.raises(InputError, match="KeyError"):
        load(f"module:{factories}:failing", no_plugin)
    assert torch.is_grad_enabled() == gradients


def test_what_lies_beside_a_factory_is_found_but_shadows_nothing(factories: str, tmp_path: Path) -> None:
    (tmp_path / f"beside_{factories}.py").write_text("import colorsys\n")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('shadows the standard library')\n")
    with (tmp_path / f"{factories}.py").open("a") as code:
        code.write(f"import beside_{factories}\n")
    sys.modules.pop("colorsys", None)
    before = sys.path.copy()
    load(f"module:{factories}:good", no_plugin)
    load(f"module:{factories}.py:good", no_plugin)
    assert sys.path == [*before, str(tmp_path)]


def test_a_factory_in_the_current_folder_goes_before_an_installed_one(factories: str, tmp_path: Path) -> None:
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / f"{factories}.py").write_text("def good(): raise RuntimeError('not this one')\n")
    sys.path.insert(0, str(tmp_path / "installed"))
    assert load(f"module:{factories}:good", no_plugin).name == "Tied"


def test_the_current_folder_is_searched_only_for_a_factory_that_lies_there(factories: str) -> None:
    before = sys.path.copy()
    with pytest.raises(InputError, match="OrderedDict"):
        load("module:collections:OrderedDict", no_plugin)
    assert sys.path == before


def test_shared_memory_is_stored_once(factories: str) -> None:
    model = load(f"module:{factories}:good", no_plugin)
    # The first name in the state dict owns the memory.
    assert model.tied == {"first.weight": "view", "second.weight": "view"}
    assert not model.tied.keys() & model.source.tensors.keys()
    assert torch.equal(model.read("second.weight"), sys.modules[factories].made.first.weight)


def test_tensors_are_read_contiguous_and_in_their_dtype(factories: str) -> None:
    source = load(f"module:{factories}:good", no_plugin).source
    assert source.read("transposed").is_contiguous()
    assert source.read("transposed").tolist() == torch.arange(12.0).reshape(3, 4).T.tolist()
    assert source.read("float16").dtype is torch.float16
    assert source.read("bfloat16_").dtype is torch.bfloat16
    assert source.read("scalar").item() == 2.5
    assert source.read("empty").shape == source.read("also_empty").shape == (0, 3)
    assert "table" in source.tensors
    assert "hidden" not in source.tensors


def test_the_skeleton_is_a_copy_without_weights(factories: str) -> None:
    module = load(f"module:{factories}:good", no_plugin).module
    made: nn.Module = sys.modules[factories].made
    assert not module.training
    assert all(parameter.is_meta and parameter.dtype is torch.float32 for parameter in module.parameters())
    assert {str(buffer.dtype) for buffer in module.buffers()} == {"torch.float32"}
    assert module.get_parameter("first.weight") is module.get_parameter("second.weight")
    # The user's own module is as it was.
    assert made.training
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert made.get_buffer("table").dtype is torch.float64


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_computes_is_copied(norm: Callable[[nn.Module], nn.Module], used: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(norm(nn.Linear(4, 3)))
    if used:
        plain(torch.ones(1, 4))
    before = plain.eval()(torch.ones(2, 4))
    copied = _skeleton("module:f", plain)
    assert all(parameter.is_meta for parameter in copied.parameters())
    copied.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(copied(torch.ones(2, 4)), before)
    assert plain(torch.ones(2, 4)).requires_grad


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "ValueError: no weights here"),
        ("exits", "SystemExit: gone"),
        ("constant", "no function"),
        ("absent", "no function"),
    ],
)
def test_a_factory_that_does_not_work(factories: str, function: str, said: str) -> None:
    assert said in rejected(f"module:{factories}:{function}", "QC-INPUT-021")


def test_a_lack_of_memory_is_not_blamed_on_the_factory(factories: str) -> None:
    with pytest.raises(MemoryError):
        load(f"module:{factories}:large", no_plugin)


@pytest.mark.parametrize("source", ["module:", "module:x", "module:a b", "module:no_such_module:f", "module:no_such.py:f"])
def test_a_factory_that_is_not_there(factories: str, source: str) -> None:
    assert source in rejected(source, "QC-INPUT-021")


def test_a_module_that_fails_to_import_says_why(factories: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:")
    assert "SyntaxError" in rejected("module:broken.py:f", "QC-INPUT-021")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "returned NoneType"),
        ("module_only", "returned Tied"),
        ("no_inputs", "example inputs are dict"),
        ("too_many", "3 example inputs, but forward names 2 (x, mask)"),
        ("unknown_name", "no parameter 'y'; it has x, mask"),
        ("no_tensor", "'x' is list"),
        ("scalars_only", "no axis that counts rows"),
        ("uneven", "5, 6 rows"),
        ("no_rows", "0 rows"),
        ("compiled", "returned OptimizedModule, a wrapper: return the module inside, its ._orig_mod"),
        ("parallel", "returned DataParallel, a wrapper: return the module inside, its .module"),
        ("on_meta", "'weight' is on the meta device"),
    ],
)
def test_what_a_factory_must_not_return(factories: str, function: str, said: str) -> None:
    message = rejected(f"module:{factories}:{function}", "QC-INPUT-022")
    assert said in message
    assert function in message


def test_other_weights_are_another_input() -> None:
    """The factory may read them from a file that nobody knows of: a run must not resume with those of an earlier one."""
    torch.manual_seed(0)
    one, other = (MemorySource(nn.Linear(2, 2), "module:f").fingerprint() for _ in range(2))
    assert one != other
