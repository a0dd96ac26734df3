"""`adapters list` and `inspect` on tiny adapters that peft wrote: as text at any width, as JSON and as a plot."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_compose.lora.adapter import read_adapter
from tests import tiny
from tests.test_cli import SOURCE, called, cli, state

__all__ = ["state"]  # the fixture that every test of the command line uses


@pytest.fixture
def app(project: Path, tmp_path: Path) -> Path:
    """A copy of the tiny project, which a test may break."""
    folder = tmp_path / "app"
    shutil.copytree(project.parent, folder, ignore=shutil.ignore_patterns("*.yml"))
    (folder / "model-compose.yml").write_text(tiny.YAML, encoding="utf-8")
    return folder


def document(*arguments: str, cwd: Path) -> Any:
    code, out, err = called("adapters", *arguments, "--json", cwd=cwd)
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    return found


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dense(folder: Path) -> dict[str, Any]:
    modules = read_adapter(folder, "x").modules
    return {path: f.scaling * f.b.double().numpy() @ f.a.double().numpy() for path, f in modules.items()}


def test_the_list_names_what_each_adapter_is(app: Path) -> None:
    code, out, err = called("adapters", "list", cwd=app)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["adapter", "rank", "alpha", "scaling", "dtype", "size", "norm", "weight", "share"] in lines
    alpaca, pirate = (next(line for line in lines if line[:1] == [name]) for name in ("alpaca", "pirate"))
    assert alpaca[1:5] == ["4", "8", "2", "float32"]
    assert pirate[1:5] == ["2", "4", "2", "float32"]
    assert "alpaca   q_proj, v_proj in 2 layers (4 modules, " in out
    assert "alpaca × pirate" in out


def test_json_has_every_number_and_they_are_those_of_the_dense_updates(app: Path) -> None:
    found = document("list", cwd=app)
    assert found["blend"]["weights"] == {"alpaca": 0.7, "pirate": 0.8}
    whole = {}
    for adapter in found["adapters"]:
        updates = dense(app / adapter["name"])
        whole[adapter["name"]] = np.sqrt(sum(np.sum(update**2) for update in updates.values()))
        assert adapter["norm"] == pytest.approx(whole[adapter["name"]])
        assert adapter["bytes"] == (app / adapter["name"] / "adapter_model.safetensors").stat().st_size
        for layer in ("0", "1"):
            of_layer = [update for path, update in updates.items() if f"layers.{layer}." in path]
            assert adapter["layers"][layer]["norm"] == pytest.approx(np.sqrt(sum(np.sum(x**2) for x in of_layer)))
    total = 0.7 * whole["alpaca"] + 0.8 * whole["pirate"]
    assert [adapter["share"] for adapter in found["adapters"]] == pytest.approx(
        [0.7 * whole["alpaca"] / total, 0.8 * whole["pirate"] / total]
    )
    (pair,) = found["pairs"]
    assert (pair["modules"], pair["cosine"], pair["inputs"]) == (0, 0.0, None)  # q and v beside o and down
    quadrature = np.hypot(0.7 * whole["alpaca"], 0.8 * whole["pirate"])
    assert found["blend"]["norm"] == pytest.approx(quadrature)


def test_the_blend_may_be_named_or_mixed(app: Path) -> None:
    assert [each["share"] for each in document("list", "--blend", "strong", cwd=app)["adapters"]] == [1.0, 0.0]
    mixed = document("list", "-b", '{"alpaca": 1, "pirate": -1}', "--component", "default", cwd=app)
    assert mixed["blend"]["weights"] == {"alpaca": 1.0, "pirate": -1.0}
    assert sum(each["share"] for each in mixed["adapters"]) == pytest.approx(1.0)
    for option, value, message in (
        ("--blend", "strng", "unknown blend 'strng'; did you mean 'strong'?"),
        ("--blend", "{bad", "--blend is not valid JSON"),
        ("--component", "other", "there is no model component 'other'; known: default"),
        ("--plot", "x.gif", "--plot: x.gif must end in .png, .svg, .pdf"),
        ("--plot", "no/x.png", "--plot: no folder no"),
    ):
        code, out, err = called("adapters", "list", option, value, cwd=app)
        assert (code, out) == (1, "")
        assert message in err


def test_ranks_and_scalings_that_differ_by_module_are_ranges(app: Path) -> None:
    tiny.save_adapter(
        app / "alpaca", app / "base", r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"],
        rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 16}, use_rslora=True,
    )  # fmt: skip
    (alpaca, _) = document("list", cwd=app)["adapters"]
    assert (alpaca["ranks"], alpaca["alphas"]) == ([2, 4], [8.0, 16.0])
    assert alpaca["scalings"] == pytest.approx([8 / 2, 16 / 2**0.5])
    out = called("adapters", "list", cwd=app)[1]
    assert "2–4" in out
    assert "4–11.31" in out


def test_what_is_suspicious_is_a_warning_and_what_is_refused_an_error(app: Path) -> None:
    weights = app / "alpaca/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}, weights)
    config = app / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "meta/llama-2"}))
    edit(app / "alpaca", base_model_name_or_path="meta/llama", target_modules=["q_proj", "v_proj", "k_proj"])
    code, out, err = called("adapters", "list", cwd=app)
    said = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "⚠ alpaca was trained on meta/llama, but the base model is meta/llama-2" in said
    assert "alpaca is zero in every module, so it changes nothing" in said
    assert "alpaca lists the target k_proj, but has no weights for it" in said
    edit(app / "pirate", use_dora=True)
    code, out, err = called("adapters", "list", cwd=app)
    assert code == 1
    assert "DoRA" in " ".join(out.split())
    assert err.startswith("❌ adapter 'pirate': use_dora is true; DoRA rescales")
    assert out.splitlines()[1].startswith("adapter"), "the other one is told all the same"
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, weights)
    code, out, err = called("adapters", "list", "--json", cwd=app)
    assert code == 1
    assert "adapter 'alpaca': model.layers.0.self_attn.q_proj holds NaN" in err
    assert len(json.loads(out)[0]["problems"]) == 2


def test_an_adapter_of_another_shape_is_an_error_and_the_bases_weights_are_not_needed(
    app: Path, tmp_path: Path
) -> None:
    wide = tiny.save_base(tmp_path / "wide", tiny.llama_config(hidden_size=64))
    for file in (app / "base").glob("*.safetensors"):
        file.unlink()
    assert called("adapters", "list", cwd=app)[0] == 0
    tiny.save_adapter(app / "alpaca", wide)
    code, _, err = called("adapters", "list", cwd=app)
    assert code == 1
    assert "fit a module of 64 inputs" in err
    (app / "base/config.json").unlink()
    code, out, err = called("adapters", "inspect", "pirate", cwd=app)
    assert "⚠ not checked against the base: ./base cannot be loaded" in " ".join(out.split())


def test_folders_need_no_file_and_are_checked_where_one_is_named(app: Path, tmp_path: Path) -> None:
    found = document("inspect", str(app / "alpaca"), "app/pirate", cwd=tmp_path)
    assert (found["component"], found["base"]) == (None, None)
    assert found["blend"]["weights"] == {"alpaca": 1.0, "pirate": 1.0}
    other = tiny.save_adapter(tmp_path / "other", tiny.save_base(tmp_path / "wide", tiny.llama_config(hidden_size=64)))
    assert called("adapters", "inspect", str(other), cwd=tmp_path)[0] == 0
    code, _, err = called("adapters", "inspect", "-f", "app/model-compose.yml", str(other), cwd=tmp_path)
    assert code == 1
    assert "adapter 'other': model.layers.0.self_attn.q_proj has A" in err
    code, _, err = called("adapters", "inspect", "app/alpaca", str(other), cwd=tmp_path)
    assert code == 1
    assert "the adapters 'alpaca' and 'other' belong to different base models" in err
    beside = document("inspect", "alpaca", "./alpaca", "./pirate", cwd=app)
    assert [adapter["name"] for adapter in beside["adapters"]] == ["alpaca", "app/alpaca", "app/pirate"]
    same = next(pair for pair in beside["pairs"] if pair["adapters"] == ["alpaca", "app/alpaca"])
    assert same["cosine"] == pytest.approx(1.0)
    assert same["inputs"]["value"] == pytest.approx(1.0)
    code, _, err = called("adapters", "inspect", "nobody", cwd=app)
    assert (code, err) == (1, "❌ there is no adapter and no folder 'nobody'; adapters: alpaca, pirate\n")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(
    app: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = called("adapters", "inspect", cwd=app)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    assert not any(line != line.rstrip() or "\x1b" in line for line in lines)
    found = document("inspect", cwd=app)
    for adapter in found["adapters"]:
        for of_layer in adapter["layers"].values():
            assert f"{of_layer['norm']:#.3g}" in out
            assert f"{of_layer['share']:.0%}" in out


def test_a_file_without_adapters_or_models(app: Path) -> None:
    path = app / "bare.yml"
    path.write_text("component: {type: model, task: text-generation, model: ./base, action: {text: Hi}}\n")
    code, out, err = called("adapters", "list", "-f", "bare.yml", cwd=app)
    assert (code, out, err) == (0, "default: ./base\nno adapters\n", "")


def test_the_plot_is_written(app: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("plot.png", "plot.svg"):
        assert called("adapters", "inspect", "--plot", name, cwd=app)[0] == 0
    assert (app / "plot.png").read_bytes().startswith(b"\x89PNG")
    svg = (app / "plot.svg").read_text(encoding="utf-8")
    for text in ("alpaca (weight 0.7, ", "Overlap of what they read (A)", "layer"):
        assert text in svg
    assert called("adapters", "inspect", "./alpaca", "--plot", "one.png", cwd=app)[0] == 0


def test_without_matplotlib_the_message_is_the_remedy(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden" / "matplotlib"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{hidden.parent}:{SOURCE}")
    code, out, err = cli("adapters", "list", "--plot", "x.png", cwd=app)
    assert (code, out) == (1, "")
    assert err == "❌ --plot needs matplotlib, which is not installed: pip install matplotlib\n"


def test_a_method_is_not_taken_for_the_sum(app: Path) -> None:
    path = app / "model-compose.yml"
    ties = "  blends:\n    voted: {method: ties, density: 0.5, weights: {alpaca: 0.7, pirate: 0.8}}\n"
    path.write_text(path.read_text(encoding="utf-8").replace("  blends:\n", ties), encoding="utf-8")
    out = called("adapters", "list", "--blend", "voted", cwd=app)[1]
    assert "the sum that the blend voted (ties) approximates has the norm" in " ".join(out.split())
    assert document("list", "--blend", "voted", cwd=app)["blend"]["method"]["method"] == "ties"
    assert document("list", cwd=app)["blend"]["method"] is None
