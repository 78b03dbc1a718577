"""`rawloop doctor`: what it finds in order, what it finds wrong, and that a failed check stops those that need it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rawloop.cli import doctor, main
from rawloop.cli.doctor import Measured
from rawloop.errors import RawloopError
from rawloop.families.higgs_audio_v2 import HiggsAudioV2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sound_config_passes_everything(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--config", str(config)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["passed"] * 8
    assert sorted(tmp_path.rglob("*")) == before
    assert "label census                       census of 8 samples: every required token is a target" in lines[2]
    assert "first loss                         first loss: audio 6.9" in lines[3]
    assert "causality probe                    causality: audio PASS, text PASS" in lines[4]


def test_the_first_failure_says_what_and_the_rest_waits(config: Path, door: Callable[..., Any]) -> None:
    done = door("doctor", "--config", config, "--adapter.target_modules", "[qproj]")
    assert done.code == 1
    rows = [line.split()[0] for line in done.out.splitlines()]
    assert rows == ["passed", "FAILED", *["skipped"] * 6]
    assert "adapter.target_modules has 'qproj', which matches no layer" in done.out
    assert "1 of 8 checks failed: data, model, first pass" in done.err


@pytest.fixture
def rows(door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[str]], Any]]:
    """Give `rows(*arguments)`: the three rows of the checks before step 0, without what needs other processes."""
    for name in ("equal_groupings", "equal_processes", "killed_and_resumed"):
        monkeypatch.setattr(doctor.Doctor, name, lambda _: "left out")

    def run(*arguments: str | Path) -> tuple[list[list[str]], Any]:
        done = door("doctor", *arguments)
        lines = done.out.splitlines()
        assert len(lines) == 8
        assert all(line.startswith("passed") for line in (*lines[:2], *lines[5:]))  # they show whatever the rest found
        return [[line[:8].strip(), line[9:43].strip(), line[44:]] for line in lines[2:5]], done

    return run


Rows = Callable[..., tuple[list[list[str]], Any]]


def test_labels_without_a_stop_token_fail_their_row_and_the_others_show(
    rows: Rows, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HiggsAudioV2.example

    def example(self: HiggsAudioV2, *arguments: Any, **named: Any) -> Any:
        made = honest(self, *arguments, **named)
        made.audio_labels[made.audio_labels == 1025] = -100
        return made

    monkeypatch.setattr(HiggsAudioV2, "example", example)
    (census, loss, probe), done = rows("--config", config)
    assert census[:2] == ["FAILED", "label census"]
    assert census[2].startswith("'EOS' (id 1025 of the stream 'audio') in any codebook: never a target in 8 samples")
    assert census[2].endswith("or train anyway with --checks.allow_missing_targets true")
    assert loss[:2] == ["passed", "first loss"]
    assert probe == ["passed", "causality probe", "causality: audio PASS, text PASS"]
    assert (done.code, done.err.splitlines()[-1]) == (1, "rawloop doctor: 1 of 8 checks failed: label census")
    (census, _, _), done = rows("--config", config, "--checks.allow_missing_targets", "true")
    assert census[0] == "passed"
    assert census[2].startswith("census of 8 samples: missing among the targets: 'EOS'")
    assert done.code == 0


def test_labels_that_were_not_shifted_and_a_dead_head_fail_rows_of_their_own(
    rows: Rows, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, load = HiggsAudioV2.collate, HiggsAudioV2.load_model

    def collate(self: HiggsAudioV2, examples: list[Any]) -> Any:
        batch = honest(self, examples)
        batch.labels = {s: pair._replace(positions=pair.positions + 1) for s, pair in batch.labels.items()}
        return batch

    def load_model(self: HiggsAudioV2, *arguments: Any) -> Any:
        model: Any = load(self, *arguments)
        torch.nn.init.zeros_(model.text_lm_head.weight)
        return model

    monkeypatch.setattr(HiggsAudioV2, "collate", collate)
    monkeypatch.setattr(HiggsAudioV2, "load_model", load_model)
    found, done = rows("--config", config, "--evaluation.enabled", "false")
    assert [row[0] for row in found] == ["passed", "FAILED", "FAILED"]
    assert "first loss of 'text' is 6.6619, chance is 6.6619: DEAD, its logits are all zero (to train" in found[1][2]
    assert "(to train anyway: --checks.allow '[dead]')" in found[1][2]
    assert found[2][2].startswith("causality of 'audio': LEAK, a prediction moves with its own target")
    assert "2 of 8 checks failed: first loss, causality probe" in done.err


def test_what_is_no_reason_to_stop_is_a_warning_in_its_row(rows: Rows, config: Path) -> None:
    (_, loss, _), done = rows("--config", config, "--checks.expect_chance", "false")
    assert loss[0] == "passed"
    assert "; warning: first loss of 'audio' is 6.9" in loss[2]
    assert done.code == 0


def test_checks_that_are_switched_off_are_skipped(rows: Rows, config: Path) -> None:
    found, done = rows("--config", config, "--checks.enabled", "false")
    assert [row[::2] for row in found] == [["skipped", "checks.enabled is false"]] * 3
    assert done.code == 0


WAITS = "skipped  {:<34} not judged: what the first pass gives is not finite"


def spoilt_weight(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    load = HiggsAudioV2.load_model

    def load_model(self: HiggsAudioV2, *arguments: Any) -> Any:
        model: Any = load(self, *arguments)
        model.get_parameter(name).data[0, 0] = value
        return model

    monkeypatch.setattr(HiggsAudioV2, "load_model", load_model)


def test_what_is_not_finite_comes_first_and_nothing_else_is_blamed(
    config: Path, door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt_weight(monkeypatch, "text_lm_head.weight", float("nan"))
    done = door("doctor", "--config", config)
    first, census, loss, probe, *others = done.out.splitlines()[1:]
    assert first.startswith(
        "FAILED   data, model, first pass            not finite: loss/text nan and the gradients of "
    )
    assert "trained weights (first base_model.model.model.layers.0.self_attn.q_proj.lora_" in first
    assert ", in the window of the samples train-" in first
    assert "; eval_loss nan, in the batches of the samples eval-" in first
    assert census.startswith("passed   label census")
    assert "DEAD, its loss is not finite: the weight 'base_model.model.text_lm_head.modules_to_save.defau" in loss
    assert "' is not finite (1 of 125,120 numbers)" in loss
    assert loss.startswith("FAILED   first loss")
    assert probe == "skipped  causality probe                    not judged: the first loss is not finite"
    names = ("4 x 1 equals 1 x 4", "2 processes equal 1", "killed and resumed, bit for bit")
    assert others == [WAITS.format(name) for name in names]
    assert done.err.splitlines()[-1].endswith("2 of 8 checks failed: data, model, first pass, first loss")


def test_an_evaluation_that_is_not_finite_is_no_pass(
    config: Path, door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HiggsAudioV2.losses

    def losses(self: HiggsAudioV2, model: Any, batch: Any) -> Any:
        made = honest(self, model, batch)
        ill = any(name.startswith("eval") for name in batch.ids)
        return {s: loss._replace(total=loss.total * float("nan") if ill else loss.total) for s, loss in made.items()}

    monkeypatch.setattr(HiggsAudioV2, "losses", losses)
    done = door("doctor", "--config", config)
    rows = [line[:8].strip() for line in done.out.splitlines()]
    assert rows == ["passed", "FAILED", *["passed"] * 3, *["skipped"] * 3]
    assert "first pass            not finite: eval_loss nan, in the batches of the samples eval-" in done.out
    assert done.err.splitlines()[-1].endswith("1 of 8 checks failed: data, model, first pass")


def test_a_loss_scale_that_overflows_is_lowered_as_in_training(
    text_checkpoint: Path, text_data: Path, door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("equal_groupings", "equal_processes", "killed_and_resumed"):
        monkeypatch.setattr(doctor.Doctor, name, lambda _: "left out")
    data = [f"--data.{split}={text_data / split}.jsonl" for split in ("train", "eval")]
    scale = ["--precision.loss_scale.init", "16777216", "--precision.mode", "amp_fp16"]
    off = ["--checks.enabled", "false", "--evaluation.enabled", "false"]
    done = door("doctor", "--model.path", text_checkpoint, *data, *scale, *off)
    assert done.code == 0, done.out


def test_what_is_not_finite_in_another_grouping_is_said_to_be_that() -> None:
    first, second = measured([1.0], 3.0), measured([float("nan")], 3.0)._replace(wrong=["loss/text nan"])
    with pytest.raises(RawloopError, match=r"^not finite: loss/text nan; as one batch of 4 on one process all is fin"):
        doctor.compare(first, second, "why")


def measured(gradient: list[float], loss: float | None, mode: str = "fp32", name: str = "w") -> Measured:
    return Measured({name: torch.tensor(gradient)}, loss, mode)


@pytest.mark.parametrize(
    ("gradient", "loss", "mode", "found"),
    [
        ([1.0, 2.0], 3.0, "fp32", None),
        ([1.0, 2.0 + 1e-6], 3.0, "fp32", None),
        (
            [1.0, 2.001],
            3.0,
            "fp32",
            r"gradients differ by 4\.5e-04 and eval_loss differ by 0\.0e\+00; rounding in fp32 explains 1e-05: why",
        ),
        ([1.0, 2.0], 3.1, "fp32", r"eval_loss differ by 3\.3e-02; rounding in fp32 explains 1e-05"),
        ([1.0, 2.001], 3.0, "bf16", None),
        ([1.0, 2.2], 3.0, "bf16", "rounding in bf16 explains 3e-02"),
        ([1.0, float("nan")], 3.0, "fp32", "gradients differ by nan"),
        ([1.0, 2.0], None, "fp32", None),
        ([1.0, 2.0], float("nan"), "fp32", "eval_loss differ by nan"),
    ],
)
def test_differences_beyond_rounding_are_found(
    gradient: list[float], loss: float | None, mode: str, found: str | None
) -> None:
    first, second = measured([1.0, 2.0], 3.0, mode), measured(gradient, loss, mode)
    if found is None:
        assert doctor.compare(first, second, "why").startswith("gradients differ by")
        return
    with pytest.raises(RawloopError, match=found):
        doctor.compare(first, second, "why")


def test_gradients_of_other_weights_are_found() -> None:
    with pytest.raises(RawloopError, match="gradients reach 1 weights in one and 1 in the other: why"):
        doctor.compare(measured([1.0], 1.0), measured([1.0], 1.0, name="v"), "why")


def test_gradients_of_zero_are_no_pass() -> None:
    with pytest.raises(RawloopError, match="the gradient is zero in every trained weight"):
        doctor.compare(measured([0.0, 0.0], 1.0), measured([0.0, 0.0], 1.0), "why")


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    for name, byte in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "state").mkdir(parents=True)
        (tmp_path / name / "state" / "same.safetensors").write_bytes(b"0")
        (tmp_path / name / "state" / "other.safetensors").write_bytes(byte)
    assert doctor.different_files(tmp_path / "a", tmp_path / "b") == ["state/other.safetensors"]
    (tmp_path / "b" / "state" / "same.safetensors").unlink()
    assert len(doctor.different_files(tmp_path / "a", tmp_path / "b")) == 2
    with pytest.raises(AssertionError, match="no weights to compare"):
        doctor.different_files(tmp_path / "none", tmp_path / "b")


def test_the_last_words_of_a_process_are_ours_where_there_are_any() -> None:
    assert doctor.last_words("x\nrawloop train: it is so\nTraceback\n") == "rawloop train: it is so"
    assert doctor.last_words("x\ny\n\n") == "y"
    assert doctor.last_words("") == "no message"
