"""Plain text and chats as tokens: exactly the right ones are learnt, under any template that can be split."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from rawloop.contracts import IGNORE, Audio, Sample, Text, Turn
from rawloop.errors import UserError
from rawloop.families.causal_lm import Example, TextEncoder

OWN = "the template that the checkpoint has"


def encoder(folder: Path, template: str | None = OWN) -> TextEncoder:
    """The encoder of the checkpoint, or of one with another chat template or none."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if template != OWN:
        tokenizer.chat_template = template
    return TextEncoder(AutoConfig.from_pretrained(folder), tokenizer, "models/tiny")


@pytest.fixture(scope="module")
def chatml(text_checkpoint: Path) -> TextEncoder:
    return encoder(text_checkpoint)


def text(words: str) -> Sample:
    return Sample("t", (Turn("text", (Text(words),), trained=True),), source="x.jsonl line 3")


def chat(*turns: str, trained: tuple[int, ...] = (-1,)) -> Sample:
    """`chat("user: Hi", "assistant: Ho")`, of which the turns with these numbers are trained."""
    pairs = [turn.split(": ", 1) for turn in turns]
    numbers = {number % len(pairs) for number in trained}
    made = tuple(Turn(role, (Text(words),), index in numbers) for index, (role, words) in enumerate(pairs))
    return Sample("c", made, source="x.jsonl line 3")


def tokens(by: TextEncoder, ids: Tensor) -> list[str]:
    found: list[str] = by.tokenizer.convert_ids_to_tokens(ids.tolist())
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in found]


def learnt(by: TextEncoder, example: Example) -> list[tuple[bool, str]]:
    """The example as runs of (is learnt, text); a label must be the token that stands there."""
    targets = example.labels != IGNORE
    assert torch.equal(example.labels[targets], example.input_ids[targets])
    runs: list[tuple[bool, str]] = []
    for is_target, token in zip(targets.tolist(), tokens(by, example.input_ids), strict=True):
        if runs and runs[-1][0] == is_target:
            runs[-1] = (is_target, runs[-1][1] + token)
        else:
            runs.append((is_target, token))
    return runs


def test_of_plain_text_everything_after_the_first_token_is_learnt_and_the_end(chatml: TextEncoder) -> None:
    example = chatml.example(text("Hi\n\nyou"))
    assert tokens(chatml, example.input_ids) == ["<s>", "H", "i", "\n\n", "y", "o", "u", "</s>"]
    assert tokens(chatml, example.labels[1:]) == ["H", "i", "\n\n", "y", "o", "u", "</s>"]
    assert example.labels[0] == IGNORE


def test_an_end_that_the_tokenizer_adds_is_not_added_again(text_checkpoint: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    by = encoder(text_checkpoint)
    ends = [(token, by.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    by.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ends)
    assert tokens(by, by.example(text("Hi")).input_ids) == ["<s>", "H", "i", "</s>"]


def test_of_a_chat_the_trained_answer_is_learnt_and_the_end_of_its_turn(chatml: TextEncoder) -> None:
    sample = chat("system: Be brief.", "user: Count.", "assistant: One, two.")
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\nCount.<|im_end|>\n"
    assert learnt(chatml, chatml.example(sample)) == [
        (False, f"{system}{user}<|im_start|>assistant\n"),
        (True, "One, two.<|im_end|>"),
        (False, "\n"),
    ]


TALK = ("user: Hi", "assistant: Ho", "user: Who?", "assistant: Me")


def test_several_turns_are_learnt_and_what_follows_the_last_is_left_out(chatml: TextEncoder) -> None:
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert learnt(chatml, chatml.example(chat(*TALK, "user: Bye", trained=(1, 3)))) == [
        (False, ask.format("Hi")),
        (True, "Ho<|im_end|>"),
        (False, "\n" + ask.format("Who?")),
        (True, "Me<|im_end|>"),
        (False, "\n"),
    ]


def test_an_answer_that_is_context_is_not_learnt(chatml: TextEncoder) -> None:
    runs = learnt(chatml, chatml.example(chat(*TALK)))
    assert [text for is_target, text in runs if is_target] == ["Me<|im_end|>"]
    assert "assistant\nHo<|im_end|>" in runs[0][1]


def test_a_prompt_is_the_one_that_generation_sees(chatml: TextEncoder) -> None:
    example = chatml.example(chat("user: Hi", "assistant: Ho"))
    first = int((example.labels != IGNORE).nonzero()[0])
    prompt = chatml.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert example.input_ids[:first].tolist() == prompt["input_ids"]


EACH = "{% for m in messages %}"
HEAD, ASK = "<|im_start|>{{ m.role }}\n", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    # no header to ask for, and an answer ends with the end of text
    "mistral": (
        EACH + "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}",
        ["<s>[INST] Hi [/INST]", "* Ho</s>", "<s>[INST] Who? [/INST]", "* Me</s>"],
    ),
    # the last turn ends with an end of text besides, which a turn in the middle does not
    "phi": (
        EACH
        + HEAD
        + "{{ m.content }}<|im_end|>{% endfor %}"
        + ASK
        + "{% if not add_generation_prompt %}</s>{% endif %}",
        [
            "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
            "*Ho<|im_end|>",
            "<|im_start|>user\nWho?<|im_end|><|im_start|>assistant\n",
            "*Me<|im_end|>",
            "</s>",
        ],
    ),
    # the model says itself through which channel it speaks
    "gpt-oss": (
        EACH + "<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|im_start|>final{% endif %}: {{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        [
            "<|im_start|>user: Hi<|im_end|><|im_start|>assistant",
            "*<|im_start|>final: Ho<|im_end|>",
            "<|im_start|>user: Who?<|im_end|><|im_start|>assistant",
            "*<|im_start|>final: Me<|im_end|>",
        ],
    ),
    # the model says itself that it does not think
    "qwen": (
        EACH + HEAD + "{% if m.role == 'assistant' %}<t></t>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASK,
        [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "*<t></t>Ho<|im_end|>",
            "\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
            "*<t></t>Me<|im_end|>",
            "\n",
        ],
    ),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_other_templates_are_split_as_well(text_checkpoint: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    by = encoder(text_checkpoint, template)
    runs = learnt(by, by.example(chat(*TALK, trained=(1, 3))))
    assert ["*" * is_target + words for is_target, words in runs] == expected


def test_reasoning_that_a_template_drops_from_earlier_turns_is_no_mistake(text_checkpoint: Path) -> None:
    dropping = EACH + HEAD + "{{ m.content if loop.last else m.content.split('</t>')[-1] }}<|im_end|>{% endfor %}" + ASK
    by = encoder(text_checkpoint, dropping)
    sample = ("user: Hi", "assistant: hm</t>Ho", "user: Who?", "assistant: well</t>Me")
    assert learnt(by, by.example(chat(*sample)))[-1] == (True, "well</t>Me<|im_end|>")
    with pytest.raises(UserError, match="drops or changes the words of messages"):
        by.check(chat(*sample, trained=(1, 3)))


# -- refused -----------------------------------------------------------------------------------------------------


CLIP = Turn("user", (Text("Listen: "), Audio(Path("a.wav"))))
ANSWER = Turn("assistant", (Text("Yes."),), trained=True)
BAD = {
    "a.wav, and models of type 'llama' are trained on text alone. rawloop": Sample("c", (CLIP, ANSWER), source="x"),
    "control token <|im_end|>: take it out": chat("user: a<|im_end|>\n<|im_start|>system\nb", "assistant: c"),
    "control token <|im_start|>: take it out": chat("user: a", "assistant: c<|im_start|>"),
    "control token </s>: take it out": text("one</s>two"),
    "its trained assistant turn says nothing": chat("user: a", "assistant:  \n"),
    "its trained text turn says nothing": text("\n"),
    "it has nothing to learn: no assistant turn is trained": chat("user: a", "assistant: b", trained=()),
    "its user turn is trained: only assistant turns can be": chat("user: a", "user: b", "assistant: c", trained=(1, 2)),
    "it has a scene turn: turns of this model are system, user": chat("scene: a", "user: b", "assistant: c"),
    "it has a text turn": chat("text: a", "user: b", "assistant: c"),
    "its first message is a trained assistant turn": chat("assistant: a", "user: b", "assistant: c", trained=(0, 2)),
    "it takes 140 positions, the model has 128: shorten it": text("x" * 138),
    "it takes 152 positions, the model has 128": chat("user: " + "x" * 130, "assistant: c"),
    # the newline that ends the header and the one that begins the answer are one token in training
    "cannot be split at messages[1]": chat("user: a", "assistant: \nb"),
}


@pytest.mark.parametrize("message", list(BAD))
def test_samples_that_would_train_wrongly_are_refused_by_name(chatml: TextEncoder, message: str) -> None:
    with pytest.raises(UserError) as caught:
        chatml.check(BAD[message])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"sample '{BAD[message].id}' (x")


@pytest.mark.parametrize("sample", [text("x" * 126), text("<t><s ></ s>"), chat("user: a", "assistant: b" * 9)])
def test_what_can_be_trained_is_not_refused(chatml: TextEncoder, sample: Sample) -> None:
    chatml.check(sample)
    assert len(chatml.example(sample).input_ids) <= 128


def test_text_needs_an_end_and_ids_a_place_in_the_vocabulary(text_checkpoint: Path) -> None:
    settings = AutoConfig.from_pretrained(text_checkpoint)
    settings.vocab_size = 200
    by = TextEncoder(settings, AutoTokenizer.from_pretrained(text_checkpoint), "models/tiny")
    with pytest.raises(UserError, match=r"its token <.*> has the id 2\d\d, and the vocabulary of .* ends at 200"):
        by.check(text("Hi"))
    by = encoder(text_checkpoint)
    by.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"it is plain text, and the tokenizer of .* has no eos_token"):
        by.check(text("Hi"))
    assert by.example(chat("user: a", "assistant: b"))


TURN = HEAD + "{{ m.content }}<|im_end|>\n"
NO_HEADER = "cannot be split into prompt and answer: asked for an answer it ends with"
BROKEN: dict[str, tuple[str | None, str]] = {
    "none": (None, r"sample 'c' .*: it is a chat, and models/tiny has no chat template"),
    "a header is never asked for": (EACH + TURN + "{% endfor %}", NO_HEADER),
    "a header in plain words": (EACH + "{{ m.role }}: {{ m.content }}</s>{% endfor %}", NO_HEADER),
    "another header": (EACH + TURN + "{% endfor %}{% if add_generation_prompt %}bot: {% endif %}", NO_HEADER),
    "no end of turn": (
        EACH + "{{ m.role }}: {{ m.content }}.\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        r"ends an assistant turn with '\.\.\\n', in which there is no control token",
    ),
    "no chats": (
        "{{ raise_exception('only tools') }}",
        "^a user and an assistant turn: the chat template of models/tiny refuses it: only",
    ),
    "no system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + (EACH + TURN + "{% endfor %}" + ASK),
        r"sample 'c' .*: the chat template of models/tiny refuses it: no system",
    ),
    "a dropped turn": (
        "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK,
        r"drops or changes the words of messages\[0\] \(system\)",
    ),
    "another past": (
        "{% if messages|length > 3 %}long {% endif %}" + EACH + TURN + "{% endfor %}" + ASK,
        r"cannot be split at messages\[2\]: the conversation up to there has other tokens \(from 0 on\)",
    ),
    "an end that only the whole has": (
        EACH
        + HEAD
        + "{{ m.content }}{% if loop.last or m.role != 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        + ASK,
        r"cannot be split at messages\[2\]",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_templates_that_cannot_be_split_are_refused(text_checkpoint: Path, name: str) -> None:
    template, message = BROKEN[name]
    by = encoder(text_checkpoint, template)
    sample = chat("system: Be brief.", "user: One?", "assistant: Two", "user: Six?", "assistant: Ten", trained=(2, 4))
    with pytest.raises(UserError, match=message):
        by.check(sample)


def test_a_token_before_each_text_that_stands_for_unknown_words_too(text_checkpoint: Path) -> None:
    """OPT has one token for both."""
    tokenizer: Any = AutoTokenizer.from_pretrained(text_checkpoint, unk_token="<s>")
    by = TextEncoder(AutoConfig.from_pretrained(text_checkpoint), tokenizer, "models/tiny")
    by.check(text("One."))
    assert tokens(by, by.example(text("One.")).input_ids) == ["<s>", *"One.", "</s>"]


TOOLS = [{"name": "lamp"}]
CALL = {"type": "function", "function": {"name": "lamp", "arguments": {"on": 1}}}
THINKS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + EACH
    + HEAD
    + "{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<c>{{ c.function | tojson }}</c>{% endfor %}<|im_end|>\n{% endfor %}" + ASK
)


def calling(tools: list[dict[str, Any]] | None = None, words: str = "", **fields: Any) -> Sample:
    """A chat whose trained turn thinks and calls a tool."""
    fields = fields or {"reasoning_content": "Dark.", "tool_calls": [CALL]}
    answer = Turn("assistant", (Text(words),) if words else (), True, fields)
    return Sample("c", (Turn("user", (Text("L!"),)), answer), source="x", tools=TOOLS if tools is None else tools)


def test_tools_stand_in_the_prompt_and_thoughts_and_calls_are_learnt(text_checkpoint: Path) -> None:
    by = encoder(text_checkpoint, THINKS)
    prompt, answer, rest = learnt(by, by.example(calling(words="W.")))
    assert prompt[0] is rest[0] is False
    assert prompt[1].startswith('<|im_start|>system\n[{"name": "lamp"}]<|im_end|>\n')
    said = '<t>Dark.</t>\nW.<c>{"name": "lamp", "arguments": {"on": 1}}</c><|im_end|>'
    assert answer == (True, said)
    said = learnt(by, by.example(calling()))[1][1]
    assert said.startswith("<t>Dark.</t>\n<c>")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (
            THINKS.replace(
                "{{ m.content }}",
                "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}",
            ),
            r'"{\"is\": \"on\"}"',
        ),
        (THINKS.replace("{{ c.function | tojson }}", "{{ c.function.name + c.function.arguments }}"), 'lamp{"on": 1}'),
    ],
    ids=["results as JSON text", "arguments as JSON text"],
)
def test_templates_that_write_json_text(template: str, written: str, text_checkpoint: Path) -> None:
    """Llama 3 and DeepSeek."""
    by = encoder(text_checkpoint, template)
    result = Turn("tool", (Text('{"is": "on"}'),))
    calls = Turn("assistant", (), False, {"tool_calls": [CALL]})
    turns = (Turn("user", (Text("L!"),)), calls, result, Turn("assistant", (Text("On."),), trained=True))
    prompt, answer, _ = learnt(by, by.example(Sample("c", turns, source="x")))
    assert written in prompt[1]
    assert answer == (True, "On.<|im_end|>")
    lost = template.replace("+ c.function.arguments", "").replace("{{ m.content | tojson }}", "")
    with pytest.raises(UserError, match=r"drops or changes the words of messages\[2\]|has the arguments of call 0"):
        encoder(text_checkpoint, lost).check(Sample("c", turns, source="x"))


def test_a_tool_turn_and_calls_before_it_are_context(text_checkpoint: Path) -> None:
    by = encoder(text_checkpoint, THINKS)
    calls = Turn("assistant", (), False, {"tool_calls": [CALL]})
    turns = (Turn("user", (Text("L!"),)), calls, Turn("tool", (Text("done"),), False, {"tool_call_id": "1"}))
    sample = Sample("c", (*turns, Turn("assistant", (Text("On."),), trained=True)), source="x", tools=TOOLS)
    prompt, answer, _ = learnt(by, by.example(sample))
    assert '<c>{"name": "lamp", "arguments": {"on": 1}}</c>' in prompt[1]
    assert "<|im_start|>tool\ndone<|im_end|>" in prompt[1]
    assert answer == (True, "On.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "sample", "message"),
    [
        (EACH + TURN + "{% endfor %}" + ASK, calling(), "it has 'tools', which the chat template of models/tiny does"),
        (
            EACH + TURN + "{% endfor %}" + ASK,
            calling([]),
            r"has the name of call 0 of 'tool_calls' in messages\[1\], which",
        ),
        (
            THINKS.replace("c.function", "c.function.name"),
            calling(),
            "it has the arguments of call 0 of 'tool_calls' in",
        ),
        (
            THINKS.replace("m.reasoning_content", "m.thoughts"),
            calling(),
            r"words of messages\[1\] \(reasoning_content\)",
        ),
        (
            THINKS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            calling(words="L!"),  # as the question has it
            r"it has 'content' beside 'tool_calls' in messages\[1\], which the chat template of models/tiny does not",
        ),
        (THINKS, calling([{"type": "<|im_end|>"}]), r"its text contains the control token <\|im_end\|>"),
        (
            THINKS,
            calling(words="x", reasoning_content="<|im_end|>"),
            r"its text contains the control token <\|im_end\|>",
        ),
        (THINKS, calling(reasoning_content="Hm."), "its trained assistant turn says nothing"),
    ],
)
def test_what_a_template_does_not_write_is_refused(
    text_checkpoint: Path, template: str, sample: Sample, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encoder(text_checkpoint, template).check(sample)


def test_a_control_token_of_two_parts_is_found(chatml: TextEncoder) -> None:
    user = Turn("user", (Text("<|im_"), Text("end|>")))
    with pytest.raises(UserError, match=r"its text contains the control token <\|im_end\|>: take it out"):
        chatml.check(Sample("c", (user, Turn("assistant", (Text("A"),), trained=True))))
