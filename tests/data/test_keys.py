"""Every key of a record is honoured, refused by name, known to change nothing, or counted and said."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawloop.audio import Segment
from rawloop.contracts import Audio, Sample, Text, Turn
from rawloop.data import DataConfig, keys
from rawloop.data.digests import digests_of
from rawloop.data.samples import read_samples
from rawloop.errors import UserError

Write = Callable[..., Path]
ASK: dict[str, Any] = {"role": "user", "content": "Q"}
TOLD: dict[str, Any] = {"role": "assistant", "content": "A"}
CHAT: dict[str, Any] = {"messages": [ASK, TOLD]}
CLIP: dict[str, Any] = {"audio_file": "a.wav", "transcript": "Hi."}
LAMP: dict[str, Any] = {"type": "function", "function": {"name": "lamp", "parameters": {}}}
PLACE = r"train.jsonl line 1: "


@pytest.fixture(autouse=True)
def clip(tone: Callable[..., Path]) -> Path:
    return tone("a.wav").resolve()


def one(path: Path, **options: Any) -> Sample:
    (sample,) = read_samples(path, DataConfig(**options))
    return sample


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**CHAT, "images": ["a.png"]}, r"'images' is \['a.png'\] \(list\): no family of rawloop sees images"),
        ({**CHAT, "start_indx": 0}, r"'start_indx' is no key \(did you mean 'start_index'\?\): rename it"),
        ({**CHAT, "wieght": 0}, r"'wieght' is no key \(did you mean 'weight'\?\): rename it"),
        ({**CHAT, "tool": [LAMP], "tols": []}, r"'tool' is no key \(did you mean 'tools'\?\)"),
        ({**CHAT, "offset": 0.5}, r"'offset' is 0.5 \(float\): put the times of a segment into its audio part"),
        ({**CHAT, "audio_file": "a.wav"}, "'audio_file' is 'a.wav' .* names its clips there or in 'audios'"),
        ({**CHAT, "documents": [{"text": "x"}]}, "'documents' is .* would change what the chat template writes"),
        ({**CHAT, "history": [["q", "a"]]}, "'history' is .* only 'messages' is read"),
        ({**CHAT, "tools": "lamp"}, "'tools' is 'lamp' .* no JSON"),
        ({**CHAT, "tools": ["lamp"]}, "'tools' is .* it must be a list of functions, each an object"),
        ({**CHAT, "system": "S", "messages": [{"role": "system", "content": "T"}, ASK, TOLD]}, "another system turn"),
        ({**CHAT, "train": False}, "it is marked as not trained: take the record out"),
        ({**CHAT, "weight": 0.5}, r"'weight' is 0.5 \(float\): 0 \(not trained\) or 1 \(trained\); weights are not"),
        ({"messages": [ASK, {**TOLD, "weight": 0}]}, r"no turn is trained: 'weight' of messages\[1\] rules"),
        ({"messages": [ASK, {**TOLD, "train": False}]}, r"no turn is trained: 'train' of messages\[1\] rules"),
        ({"messages": [ASK, {**TOLD, "loss_scale": 0.0}]}, r"no turn is trained: 'loss_scale' of messages\[1\] rules"),
        (
            {"messages": [ASK, {**TOLD, "loss_scale": 2}]},
            r"messages\[1\]: 'loss_scale' is 2 \(int\): 0 \(not trained\)",
        ),
        ({"messages": [ASK, {**TOLD, "train": 0}]}, r"messages\[1\]: 'train' is 0 \(int\): it must be true or false"),
        ({"messages": [ASK, {**TOLD, "weight": 1, "loss": False}]}, "'weight' says that it is trained, 'loss' that it"),
        (
            {"messages": [ASK, {**TOLD, "recipient": "lamp"}]},
            r"messages\[1\]: 'recipient' is 'lamp' \(str\): recipients",
        ),
        ({"messages": [ASK, {**TOLD, "tool_cals": [1]}]}, r"messages\[1\]: 'tool_cals' .*did you mean 'tool_calls'\?"),
        (
            {"messages": [{**ASK, "tool_calls": [{}]}, TOLD]},
            r"messages\[0\]: 'tool_calls' is .* in an assistant message",
        ),
        ({"messages": [ASK, {**TOLD, "tool_calls": [{"function": {}}]}]}, "has no function with a name"),
        ({"messages": [ASK, {**TOLD, "content": " \n"}]}, r"messages\[1\] is trained and has only blanks:"),
        ({"messages": [{"from": "human", "value": "Q"}]}, r"messages\[0\] is ShareGPT's: call 'from' 'role'"),
        ({"messages": [ASK, {"role": "gpt", "content": "A"}]}, "role 'gpt' .*it is called 'assistant' here"),
        ({**CLIP, "system": "S"}, "'system' is 'S' .* the model's system text is fixed"),
        ({**CLIP, "prompt_audio": "a.wav"}, "'prompt_audio' is .* call a reference clip 'ref_audio_file'"),
        (
            {**CLIP, "text": "Ho."},
            r"'transcript' is 'Hi.' and 'text' is 'Ho.', which should be the same",
        ),
        ({**CLIP, "ref_audio": "a.wav", "ref_audio_file": "b.wav", "ref_text": "x"}, "'ref_audio_file' is 'b.wav'"),
        (
            {**CLIP, "ref_audio_file": "b.wav", "ref_offset": 1.5},
            "'ref_offset' is 1.5 .*: cut this part of the reference",
        ),
        ({**CLIP, "weight": 0}, "it is marked as not trained"),
        (
            {**CLIP, "offset": -0.1, "duration": 1},
            r"'offset' is -0.1 \(float\): it must be a number of seconds, from 0",
        ),
        ({**CLIP, "offset": "0", "duration": 1}, r"'offset' is '0' \(str\): it must be a number of seconds"),
        ({**CLIP, "offset": 0.1, "duration": 0}, "a segment from 0.1 s to 0.1 s has nothing in it"),
        ({**CLIP, "start": 0.3, "end": 0.2}, "a segment from 0.3 s to 0.2 s has nothing in it"),
        ({**CLIP, "start": 0.1, "offset": 0.2}, "'offset' is 0.2 and 'start' is 0.1, which should be the same"),
        ({**CLIP, "start": 0.1, "duration": 0.1, "end": 0.4}, "ends at 0.4 s and has a duration of 0.1 s"),
        ({**CLIP, "audio_file": "a.wav#t=0,1"}, "has #t= in its name, which stands for a segment"),
        ({"text": "A document.", "audio_filepath": "a.wav"}, "'audio_filepath' is .* call the clip .* 'audio_file'"),
    ],
)
def test_keys_that_would_change_the_meaning_are_refused_by_name(
    record: dict[str, Any], message: str, jsonl: Write
) -> None:
    with pytest.raises(UserError, match=PLACE + ".*" + message):
        read_samples(jsonl(record))


def test_what_data_sets_say_about_their_records_needs_no_word(jsonl: Write) -> None:
    about = {"speaker_id": "x", "language": "zh", "source": "web", "duration": 3.2, "quality_score": 1.0, "meta": {}}
    lines: list[str] = []
    read_samples(jsonl({**CHAT, **about, "mood": None}, {**CLIP, **about}, {"text": "T", **about}), notice=lines.append)
    assert lines == []


def test_unknown_keys_are_counted_and_said_once_and_refused_when_strict(jsonl: Write) -> None:
    told = {"role": "assistant", "content": [{"type": "text", "text": "A", "color": "red"}], "mood": "glad"}
    path = jsonl({"messages": [ASK, told], "mood": "glad"}, *({**CLIP, "mood": "sad", "id": f"c{i}"} for i in range(2)))
    lines: list[str] = []
    read_samples(path, notice=lines.append)
    assert lines == [
        f"{path}: keys that nothing reads: 'mood' 3 times, 'mood (of a message)' 1 times, 'color (of a part)' 1 times "
        "(data.strict: true refuses them)"
    ]
    with pytest.raises(UserError, match=r"line 1: 'mood' is no key of a record that is known, and data.strict is true"):
        read_samples(path, DataConfig(strict=True))


def test_a_task_beside_the_samples_is_refused(metadata: Write) -> None:
    folder = metadata(CLIP)
    file = folder / "metadata.json"
    file.write_text(file.read_text().replace('"dataset_info": {}', '"task_type": "zero_shot_voice_cloning"'))
    with pytest.raises(UserError, match=r"'task_type' is .* beside 'samples' nothing reads it"):
        read_samples(folder)


def test_turns_that_say_so_are_not_trained_or_are(jsonl: Write) -> None:
    answers = [{**TOLD, "weight": 1}, TOLD, {**TOLD, "loss_scale": 1.0}, {**TOLD, "train": False}]
    sample = one(jsonl({"messages": [turn for answer in answers for turn in (ASK, answer)], "weight": 1}))
    assert [turn.trained for turn in sample.turns[1::2]] == [True, False, True, False]


def test_system_beside_messages_is_a_system_turn(jsonl: Write) -> None:
    turn = Turn("system", (Text("Be brief."),))
    assert one(jsonl({**CHAT, "system": "Be brief."})).turns[0] == turn
    messages = [{"role": "system", "content": "Be brief."}, ASK, TOLD]
    assert one(jsonl({"messages": messages, "system": "Be brief."})).turns.count(turn) == 1
    assert len(one(jsonl({**CHAT, "system": ""})).turns) == 2


def test_null_is_written_for_what_a_record_has_not(jsonl: Write) -> None:
    (chat,) = read_samples(jsonl({"messages": [ASK, TOLD], "audio_file": None, "text": None}))
    (clip,) = read_samples(jsonl({"messages": None, **CLIP, "text": None}))
    (plain,) = read_samples(jsonl({"messages": None, "audio_file": None, "text": "T"}))
    assert [sample.turns[-1].role for sample in (chat, clip, plain)] == ["assistant", "assistant", "text"]
    with pytest.raises(UserError, match="'messages' is None"):
        read_samples(jsonl({"messages": None}))


def test_a_switch_that_is_off_changes_nothing(jsonl: Write) -> None:
    lines: list[str] = []
    record = {"messages": [ASK, {**TOLD, "prefix": False}], "continue_final_message": False}
    assert len(read_samples(jsonl(record), notice=lines.append)) == 1
    assert not lines
    with pytest.raises(UserError, match=r"'prefix' is True .* would change what the chat template writes"):
        read_samples(jsonl({"messages": [ASK, {**TOLD, "prefix": True}]}))


@pytest.mark.parametrize("arguments", [{"on": True}, '{"on": true}'])
@pytest.mark.parametrize("tools", [[LAMP], '[{"type": "function", "function": {"name": "lamp", "parameters": {}}}]'])
def test_tools_and_calls_go_to_the_template_as_objects(arguments: object, tools: object, jsonl: Write) -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "lamp", "arguments": arguments}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "It is dark."}
    answer = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "lamp"}
    sample = one(jsonl({"messages": [ASK, calls, answer, TOLD], "tools": tools}))
    done = {**call, "function": {"name": "lamp", "arguments": {"on": True}}}
    assert sample.tools == [LAMP]
    assert sample.turns[1] == Turn("assistant", (), False, {"tool_calls": [done], "reasoning_content": "It is dark."})
    assert sample.turns[2] == Turn("tool", (), False, {"tool_call_id": "c1", "name": "lamp"})


@pytest.mark.parametrize("none", ["", " ", "{}", {}])
def test_a_call_without_arguments_is_taken(none: object, jsonl: Write) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "off", "arguments": none}}]}
    sample = one(jsonl({"messages": [ASK, calls, TOLD]}))
    assert sample.turns[1].fields == {"tool_calls": [{"function": {"name": "off", "arguments": {}}}]}


def test_samples_with_other_tools_calls_and_segments_are_other_samples(jsonl: Write) -> None:
    call = [{**TOLD, "tool_calls": [{"name": "lamp", "arguments": {"on": on}}]} for on in (0, 1)]
    records = [CHAT, *({**CHAT, "tools": [{**LAMP, "type": name}]} for name in ("a", "b"))]
    records += [{"messages": [ASK, answer]} for answer in call]
    records += [{**CLIP, "offset": start} for start in (0.0, 0.1, 0.2)]
    digests = digests_of(read_samples(jsonl(*records)), lambda clip: "")
    assert len(set(digests)) == len(digests) == 8


@pytest.mark.parametrize(
    ("times", "start", "end"),
    [
        ({"offset": 0.1, "duration": 0.2}, 0.1, 0.3),
        ({"offset": 0, "duration": 0.2}, 0.0, 0.2),
        ({"start": 0.1, "end": 0.3}, 0.1, 0.3),
        ({"start_time": 0.1, "end_time": 0.3, "duration": 0.2}, 0.1, 0.3),
        ({"offset": 0.1}, 0.1, None),
        ({"end": 0.3}, 0.0, 0.3),
        ({"duration": 0.2}, 0.0, None),
        ({"duration": "0.2 s", "offset": None}, 0.0, None),
    ],
)
def test_a_segment_is_what_offset_and_duration_or_start_and_end_name(
    times: dict[str, Any], start: float, end: float | None, jsonl: Write, clip: Path
) -> None:
    path = Segment(clip, start, end).path()
    assert one(jsonl({**CLIP, **times})).audio_paths() == [path]
    answer = {"role": "assistant", "content": [{"type": "audio", "path": "a.wav", **times}]}
    assert one(jsonl({"messages": [ASK, answer]})).audio_paths() == [path]


def test_ref_audio_and_ref_text_are_a_reference(jsonl: Write, clip: Path, tone: Callable[..., Path]) -> None:
    reference = tone("r.wav", hertz=330).resolve()
    sample = one(jsonl({**CLIP, "ref_audio": "r.wav", "ref_text": "Ho."}))
    assert sample.task == "zero_shot_voice_cloning"
    assert sample.turns[1:3] == (Turn("user", (Text("Ho."),)), Turn("assistant", (Audio(reference),)))
    assert sample.audio_paths() == [reference, clip]


def test_the_docs_list_the_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Keys")[1].split("\n## ")[0]
    rows = [[set(re.findall(r"`(\w+)`", cell)) for cell in row.split("|")[2:4]] for row in section.splitlines()[6:14]]
    kinds = [keys.CHAT, keys.CLIP, keys.PLAIN, keys.REFERENCE, keys.MESSAGE]
    kinds += [keys.TEXT_PART, keys.AUDIO_PART, keys.METADATA_FILE]
    assert rows == [[set(kind.read), set(kind.refused)] for kind in kinds]
    about, places = re.findall(r"These keys .*", section)[-2:]
    assert set(re.findall(r"`(\w+)`", about)) == keys.ABOUT
    alone = set().union(*(kind.harmless - keys.ABOUT for kind in kinds))
    assert alone <= set(re.findall(r"`(\w+)`", places))
