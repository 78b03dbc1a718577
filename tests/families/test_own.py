"""A family of the user's own: found where the command is started, and refused in a line that says what to mend."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model

from rawloop.cli import main
from rawloop.components import build_family
from rawloop.config import RunConfig
from rawloop.contracts import Family, has
from rawloop.data.config import DataConfig
from rawloop.demo import SPEECH
from rawloop.errors import CheckpointError, UserError
from rawloop.families import REQUIRED, ModelConfig, load_family
from rawloop.records import read_metrics

ROOT = Path(__file__).parent.parent.parent
WHOLE = """
class Own:
    streams, stream_weights = ("text",), {"text": 1.0}
    def __init__(self, config):
        self.path = config.path
    def load_model(self, path=None): ...
    check = example = collate = losses = load_model
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Give `write(code, name)`, which writes a module into the current folder; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    # as the console script begins: the current folder is not among the places
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def written(code: str, name: str = "mine_for_tests.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        return file

    yield written
    for name in set(sys.modules) - before:
        if name.startswith("mine_for_tests"):
            del sys.modules[name]


def load(family: str = "mine_for_tests:Own", path: str = "") -> Family:
    return load_family(ModelConfig(path=path, family=family))


def test_it_is_found_in_the_current_folder_and_reads_its_path_itself(write: Callable[..., Path]) -> None:
    write(WHOLE)
    assert getattr(load(path="any words"), "path") == "any words"  # noqa: B009
    write(WHOLE, "mine_for_tests_package/inside.py")
    assert type(load("mine_for_tests_package.inside:Own")).__name__ == "Own"


def test_methods_that_are_not_required_may_be_left_out(write: Callable[..., Path]) -> None:
    write(WHOLE.replace("class Own:", "from rawloop.contracts import Family\nclass Own(Family):"))
    family = load()  # of the protocol it inherits methods that do nothing
    assert has(family, *REQUIRED)
    optional = {name for name in vars(Family) if not name.startswith("_")} - set(REQUIRED)
    assert optional == {"logits", "probe", "special_targets", "pieces", "chance", "perturb"}
    assert not any(has(family, name) for name in optional)


RAISES = """
class Own:
    def __init__(self, config):
        self.helper()
    def helper(self):
        {}["vocabulary"]
"""
DEEP = """
import json
class Own:
    def __init__(self, config):
        json.loads("no")
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, r"cannot be imported: there is no module mine_for_tests in .*; start from its folder"),
        (
            "import no_such_module_anywhere",
            r"ModuleNotFoundError: No module named 'no_such_.* \(.*mine_for_tests.py, line 1\)",
        ),
        ("from math import tau\nfrom math import tauu", r"cannot be imported: ImportError: .*tests.py, line 2\)"),
        ("class Own:\n    pass\n1 / 0\n", r"cannot be imported: ZeroDivisionError: .*mine_for_tests.py, line 3\)"),
        ("class Own(:\n    pass\n", r"cannot be imported: SyntaxError: .*mine_for_tests.py, line 1\)$"),
        ("class Owm:\n    pass\n", r"mine_for_tests.py has no Own \(did you mean 'Owm'\?\)"),
        (RAISES, r"cannot be made from model's config: KeyError: 'vocabulary' \(.*mine_for_tests.py, line 6\)"),
        (DEEP, r"cannot be made from model's config: .*JSONDecodeError: .*mine_for_tests.py, line 5\)"),
        ("class Own:\n    def __init__(self):\n        pass\n", r"cannot be made from model's config: TypeError: "),
        (WHOLE.replace("collate = losses", "losses"), r"which lacks collate: see rawloop.contracts"),
        (WHOLE + "    losses = None\n", r"which lacks losses: see rawloop.contracts"),
        (WHOLE.replace("streams, stream_weights", "streams, weights"), r"which lacks stream_weights: see"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    write: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    code: str | None,
    message: str,
) -> None:
    if code is not None:
        write(code)
    with pytest.raises(UserError, match=message):
        load()
    sys.modules.pop("mine_for_tests", None)
    assert main(["train", "--device=cpu", "--model.family=mine_for_tests:Own", "--output=run"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("rawloop train: model.family is 'mine_for_tests:Own'")
    assert "\n" not in said


def test_what_a_family_says_itself_is_left_as_it_is(write: Callable[..., Path]) -> None:
    refuses = "    def __init__(self, config):\n        raise CheckpointError('my words')\n"
    write(f"from rawloop.errors import CheckpointError\nclass Own:\n{refuses}")
    with pytest.raises(CheckpointError, match=r"^my words$"):
        load()


BEYOND = """
from mine_for_tests_page import ByteLM
class Own(ByteLM):
    def example(self, sample, codes=None):
        name, ids = super().example(sample)
        ids[3] = 257 if "bad" in name else ids[3]
        return name, ids
    def collate(self, examples):
        batch = super().collate(examples)
        text = batch.labels["text"]
        batch.labels["text"] = text._replace(targets=text.targets.clamp(max=256))
        return batch
"""


def test_an_id_that_the_model_has_no_row_for_is_found_under_the_name_that_it_has(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    write(page.split("```python\n")[1].split("```")[0], "mine_for_tests_page.py")
    write(BEYOND)
    write("".join(json.dumps({"id": name, "text": "la la la"}) + "\n" for name in ("bad", "good")), "data.jsonl")
    common = ["--device=cpu", "--model.family=mine_for_tests:Own", "--adapter.mode=full", "--data.train=data.jsonl"]
    assert main(["train", *common, "--data.eval=data.jsonl", "--output=run"]) == 2
    said = "sample 'bad' (data.jsonl line 1): its 'ids' has the id 257 at position 3, and the model knows 0 to 256"
    assert said in capsys.readouterr().err
    assert main(["evaluate", *common, "--data.eval=data.jsonl", "--output=run"]) == 2
    assert said in capsys.readouterr().err


STORED = """
from mine_for_tests_page import ByteLM
class Own(ByteLM):
    def __init__(self, config):
        super().__init__(config)
        self.path = config.path
    def load_model(self, path=None):
        return super().load_model(path or self.path)
"""


def test_lora_on_a_plain_module_trains_resumes_and_merges(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    write(page.split("```python\n")[1].split("```")[0], "mine_for_tests_page.py")
    write(STORED)
    family = load(path="")
    (tmp_path / "base").mkdir()
    save_model(family.load_model(), str(tmp_path / "base" / "model.safetensors"))
    write("".join(json.dumps({"text": f"{k}: " + "la " * k}) + "\n" for k in range(8)), "data.jsonl")
    model = ["--model.family=mine_for_tests:Own", "--model.path=base"]
    adapter = ["--adapter.mode=lora", "--adapter.target_modules=[head]", "--checks.expect_chance=true"]
    data = ["--data.train=data.jsonl", "--data.eval=data.jsonl", "--train.batch_size=2", "--optim.lr=0.01"]
    common = ["train", "--device=cpu", *model, *adapter, *data, "--checkpoint.save_every=2"]
    assert main([*common, "--output=whole", "--train.max_steps=4"]) == 0
    resume = "--resume=whole/checkpoints/step-00000002"
    assert main([*common, "--output=resumed", "--train.max_steps=4", resume]) == 0
    weights = "checkpoints/step-00000004/adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    kept = Path("whole", weights).parent
    shutil.copytree(kept, "alone")  # without the checkpoint around it, which knows its run's base model
    merge = ["merge", "--adapter=alone", "--output=merged", model[0]]
    capsys.readouterr()
    assert main(merge) == 2
    assert "which does not name its base model: pass --model.path" in capsys.readouterr().err
    assert main([*merge, model[1]]) == 0
    assert main(["merge", f"--adapter={kept}", "--output=again", model[0]]) == 0
    assert capsys.readouterr().out.count("bound 1e-04") == 2
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {"head.weight"}


def test_the_smallest_family_trains_and_says_once_what_is_not_checked(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    write(page.split("```python\n")[2].split("```")[0])
    family = "--model.family=mine_for_tests:Bigram"
    write("".join(json.dumps({"text": f"{k}: " + "la " * k}) + "\n" for k in range(8)), "data.jsonl")
    data = ["--data.train=data.jsonl", "--data.eval=data.jsonl", "--train.batch_size=2", "--optim.lr=0.5"]
    common = ["--device=cpu", family, "--adapter.mode=full", *data, "--checkpoint.save_every=2"]
    assert main(["train", *common, "--output=whole", "--train.max_steps=4"]) == 0
    said = capsys.readouterr().out
    assert said.count("not checked, as the family lacks a method for it") == 1
    for method in ("logits", "perturb", "special_targets", "pieces", "chance"):
        assert f"(no `{method}`)" in said
    losses: list[Any] = [line["eval_loss"] for line in read_metrics(tmp_path / "whole") if "eval_loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    assert main(["train", *common, "--output=resumed", "--train.max_steps=4", "--resume=whole/checkpoints/latest"]) == 2
    start = "--resume=whole/checkpoints/step-00000002"
    assert main(["train", *common, "--output=resumed", "--train.max_steps=4", start]) == 0
    weights = "checkpoints/step-00000004/model/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    capsys.readouterr()
    assert main(["inspect", "whole/config.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "(not shown: Bigram has no `pieces`)" in shown
    assert main(["evaluate", "whole/config.yaml", "--checkpoint=latest"]) == 0


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    """The folder of a tiny Whisper with random weights, and data of the bundled clips beside it."""
    from tokenizers import pre_tokenizers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *special])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], language="english", task="transcribe")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    folder = tmp_path / "whisper"
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=4), tokenizer).save_pretrained(folder)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    most = {"num_mel_bins": 16, "max_source_positions": 200, "max_target_positions": 64}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    start = tokenizer.convert_tokens_to_ids(special[1])
    config = WhisperConfig(vocab_size=len(tokenizer), decoder_start_token_id=start, **sizes, **heads, **most, **ends)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    for split in ("train", "eval"):
        lines = []
        for clip in sorted((SPEECH / split).glob(f"{split}-en-*.flac"))[:4]:
            shutil.copy(clip, tmp_path)
            heard = {"role": "user", "content": [{"type": "audio", "path": clip.name}]}
            lines.append(json.dumps({"messages": [heard, {"role": "assistant", "content": "One two three."}]}) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    return folder


def test_the_page_trains_a_whisper_in_60_lines(
    write: Callable[..., Path], whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    code, settings = page.split("```python\n")[3].split("```")[0], page.split("```yaml\n")[2].split("```")[0]
    assert len(code.splitlines()) <= 60
    write(code, "mine_for_tests.py")
    write(settings.replace("listening:", "mine_for_tests:").replace("openai/whisper-small", str(whisper)), "run.yaml")
    common = ["train", "--device=cpu", "--config=run.yaml", "--train.batch_size=2", "--optim.lr=0.1"]
    common += ["--checkpoint.save_every=2"]
    assert main([*common, "--output=whole", "--train.max_steps=6"]) == 0, capsys.readouterr().err
    losses: list[Any] = [line["eval_loss"] for line in read_metrics(tmp_path / "whole") if "eval_loss" in line]
    assert losses[0] == pytest.approx(math.log(261), rel=0.02)
    assert losses[-1] < losses[0] - 0.01  # of attention alone, in a random model
    assert not (tmp_path / "whole" / "capsules").exists()  # no alarm
    start = "--resume=whole/checkpoints/step-00000002"
    assert main([*common, "--output=resumed", "--train.max_steps=6", start]) == 0
    weights = "checkpoints/step-00000006/adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    adapter, family = "--adapter=whole/best/adapter", "--model.family=mine_for_tests:Whisper"
    assert main(["merge", adapter, "--output=merged", family]) == 0
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("eval.jsonl", "train.jsonl"))
    (tmp_path / "train.jsonl").write_text('{"text": "no clip"}\n')
    assert main([*common, "--output=other"]) == 2
    assert "is not one clip of a user and its words" in capsys.readouterr().err


DEAD = """
from mine_for_tests_page import Bigram
class Own(Bigram):
    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return {name: loss._replace(total=5.0 + 0.0 * loss.total) for name, loss in losses.items()}
"""


def test_a_loss_that_is_wrong_is_found_without_the_optional_methods(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    write(page.split("```python\n")[2].split("```")[0], "mine_for_tests_page.py")
    write(DEAD)
    write('{"text": "la la"}\n{"text": "lo lo"}\n', "data.jsonl")
    data = ["--data.train=data.jsonl", "--data.eval=data.jsonl", "--train.batch_size=2", "--adapter.mode=full"]
    assert main(["train", "--device=cpu", "--model.family=mine_for_tests:Own", *data, "--output=run"]) == 1
    assert "DEAD, its gradient is zero in every trained weight" in capsys.readouterr().err


def test_a_family_that_cannot_pack_is_not_told_to(write: Callable[..., Path]) -> None:
    write(WHOLE)
    config = RunConfig(model=ModelConfig(path="any", family="mine_for_tests:Own"), data=DataConfig(packing=True))
    with pytest.raises(UserError, match=r"data.packing is true, and the family Own cannot pack: set it to false"):
        build_family(config)
