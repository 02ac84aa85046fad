"""--config FILE.yaml: what the file may say, who wins, that a run's own file repeats the run; and what a run says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")

from unet_coco import engine, train
from unet_coco.checkpoint import load_checkpoint
from unet_coco.options import as_yaml, parse_options
from unet_coco.shapes import ShapesSettings, ensure_shapes
from unet_coco.train import main

from tests.examples.test_examples import same
from tests.examples.unet_coco_data import SMALL, draw_shapes


def given(folder: Path, text: str, *more: str) -> list[str]:
    """Write the file, and return a command line with it at the end."""
    file = folder / "given.yaml"
    file.write_text(text, encoding="utf-8")
    return [*more, "--config", str(file)]


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    text = "epochs: 3\nimage_size: [64, 32]\nclasses: [cat, dog]\nprecisions: fp32\nwandb: false\nlr: 1e-4\n"
    settings = parse_options(given(tmp_path, text, "--epochs", "7"))
    assert (settings.epochs, settings.image_size, settings.lr) == (7, (64, 32), 1e-4)
    assert (settings.classes, settings.precisions, settings.wandb) == (("cat", "dog"), ("fp32",), False)
    assert type(settings.epochs) is int and type(settings.lr) is float, "nothing that a checkpoint would have to know"


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    options = ["--classes", "cat,dog", "--no-wandb", "--resume", "--init-from", "a.pt", "--init-skip", "head.*,stem.*"]
    settings = parse_options([*options, "--telemetry-every", "0", "--steps", "4"])
    again = parse_options(given(tmp_path, as_yaml(settings)))
    assert vars(again) == vars(settings) | {"resume": False}


REFUSED = [
    ("epohcs: 3", r"unknown option 'epohcs'[\s\S]*'epochs'"),
    ("epochs: -3", r"--epochs is out of range[\s\S]*-3[\s\S]*value >0"),
    ("steps: 0", r"--steps is out of range[\s\S]*0[\s\S]*value >0"),
    ("epochs: many", r"--epochs is no value that it can have[\s\S]*many"),
    ("task: poses", r"--task is no value[\s\S]*poses[\s\S]*detection"),
    ("resume: perhaps", r"neither true nor false[\s\S]*resume: perhaps"),
    ("image_size: [64]", "--image-size is too small"),
    ("image_size: 64", r"image_size is no list[\s\S]*image_size: 64[\s\S]*\[96, 128\]"),
    ("image-size: 64 64", "image-size is no list"),
    ("image_size: [a, b]", r"--image-size is no value that it can have[\s\S]*value: a"),
    ("augment: flip", r"augment is no list[\s\S]*augment: \[flip\]"),
    ("augment: null", "augment is no list"),
    ("pictures: null", r"pictures has no value[\s\S]*without the line it is 4"),
    ("device: null", "device has no value"),
    ("lr: 0.1\nepochs:", "epochs has no value"),
    ("data: [1]", r"data is no text[\s\S]*one text"),
    ("classes: 5", r'classes is no text and no list[\s\S]*classes: "5"'),
    ("precisions: 5", "precisions is no text and no list"),
    ("seed: 99999999999999999999", "--seed is out of range"),
    ("- epochs", r"--config cannot be read[\s\S]*lines such as epochs: 20"),
    ("just a text", "--config cannot be read"),
    ("epochs: [1", "--config cannot be read"),
    ("out: !!python/object/apply:os.getcwd []", r"--config cannot be read[\s\S]*constructor"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_the_file_may_not_say(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options(given(tmp_path, text))


@pytest.mark.parametrize("config", [["--config", "FILE"], ["--config=FILE"], ["--conf", "FILE"], ["--conf=FILE"]])
def test_the_command_line_wins_in_every_spelling(config: list[str], tmp_path: Path) -> None:
    given(tmp_path, "epochs: 3\nlr: 0.5\n")
    words = [word.replace("FILE", str(tmp_path / "given.yaml")) for word in config]
    for call in ([*words, "--epochs", "9"], ["--epochs", "9", *words]):
        settings = parse_options(call)
        assert (settings.epochs, settings.lr) == (9, 0.5)


def test_a_home_folder_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = parse_options(given(tmp_path, "out: ~/runs/a\ndata: ~/coco\ninit_from: ~/last.pt\n"))
    assert (settings.out, settings.init_from) == (tmp_path / "runs" / "a", tmp_path / "last.pt")
    assert settings.data == str(tmp_path / "coco")


def test_an_option_that_does_not_exist_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, near in (("--epochss", "--epochs"), ("--imagesize", "--image-size"), ("--zzz", "")):
        with pytest.raises(SystemExit):
            parse_options([wrong, "1"])
        told = capsys.readouterr().err
        assert f"unrecognized arguments: {wrong} 1" in told and (f"perhaps {near}; " in told) == bool(near)


def test_no_file() -> None:
    with pytest.raises(ValueError, match=r"--config cannot be read[\s\S]*nothere"):
        parse_options(["--config", "nothere.yaml"])


def test_version_and_groups_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, told in (("--version", "te_nvfp4_cv "), ("--help", "\nmodel:\n  --scale F")):
        with pytest.raises(SystemExit) as ended:
            parse_options([option])
        assert ended.value.code == 0 and told in capsys.readouterr().out


def test_what_takes_long_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line when data are drawn, the first model is built, a log is opened, and a model is evaluated."""
    last: dict[str, str] = {}

    def noting(where: Any, name: str) -> None:
        real = getattr(where, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            lines = capsys.readouterr().out.splitlines()
            last.setdefault(name, lines[-1] if lines else "nothing")
            if name == "ensure_shapes":
                arguments = (arguments[0], ShapesSettings(train=8, val=2, height=32, width=32))
            return real(*arguments, **named)

        monkeypatch.setattr(where, name, noted)

    for name in ("ensure_shapes", "Trainer", "start_telemetry"):
        noting(train, name)
    noting(engine.Trainer, "summary")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = [option for option in SMALL if option != "--no-wandb"]
    main([*small, "--out", str(tmp_path / "run"), "--precisions", "fp32", "--steps", "1", "--pictures", "0"])
    assert "shapes" in last["ensure_shapes"] and "drawn now" in last["ensure_shapes"]
    assert last["Trainer"].startswith("building the models")
    assert last["start_telemetry"] == "fp32: opening a W&B log ..."
    assert last["summary"].startswith("fp32: evaluating")


def test_a_runs_own_file_repeats_it(tmp_path: Path) -> None:
    data = ensure_shapes(tmp_path / "data", ShapesSettings(train=8, val=2, height=32, width=32))
    main(["--data", str(data), "--out", str(tmp_path / "a"), *SMALL, "--precisions", "fp32", "--steps", "2"])
    main(["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")])
    same(*(load_checkpoint(tmp_path / run / "fp32" / "last.pt")["model"] for run in "ab"))


def test_a_resume_that_is_refused_leaves_the_file_of_the_run(tmp_path: Path) -> None:
    call = [*SMALL, "--data", str(draw_shapes(tmp_path)), "--out", str(tmp_path / "run"), "--precisions", "fp32"]
    main([*call, "--steps", "1", "--pictures", "0"])
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"differing: augment\)[\s\S]*augment = its default[\s\S]*augment = \[\]"):
        main([*call, "--steps", "1", "--augment", "--resume"])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    main([*call, "--steps", "2", "--pictures", "0", "--resume"])
    assert b"steps: 2" in (tmp_path / "run" / "config.yaml").read_bytes()
