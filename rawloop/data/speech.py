"""Turns speech samples in the layouts of other trainers into conversations that a speech model takes.

The user gives the words, the assistant's clip speaks them, and a reference clip is a separate turn or part of the
scene. Nothing is invented: a clip without words stays as it is, and the family refuses it.
"""

import re
from collections.abc import Sequence

from rawloop.contracts import Audio, Text, Turn

Turns = tuple[Turn, ...]
SCENE = re.compile(r"(.*?)\s*<\|scene_desc_start\|>(.*)<\|scene_desc_end\|>\s*", re.DOTALL)
CLIP = "\0"  # stands for a clip in a text, as no tokenizer needs it


def clips_of(turn: Turn) -> list[Audio]:
    """Return the clips of a turn, in order."""
    return [part for part in turn.parts if isinstance(part, Audio)]


def words_of(turn: Turn) -> str:
    """Return the words of a turn, without blanks around them."""
    return "".join(part.text for part in turn.parts if isinstance(part, Text)).strip()


def answer_with_words(turns: Turns) -> Turns:
    """Split an answer that is a clip and its words, without a question, into two turns: `<audio>words` of ms-swift."""
    answers = [turn for turn in turns if turn.role not in ("system", "scene")]
    if len(answers) != 1 or answers[0].role != "assistant" or len(clips_of(answers[0])) != 1:
        return turns
    (answer,) = answers
    words = words_of(answer)
    if not words:
        return turns
    asked = (Turn("user", (Text(words),)), Turn("assistant", tuple(clips_of(answer)), answer.trained))
    return (*(turn for turn in turns if turn is not answer), *asked)


def recognition_reversed(turns: Turns) -> Turns:
    """Turn a recognition sample (clip and instruction, words) round: the model speaks the words.

    The user's instruction is left out: it asks a model to listen.
    """
    users = [turn for turn in turns if turn.role == "user"]
    answers = [turn for turn in turns if turn.role == "assistant"]
    clips = [clip for turn in turns for clip in clips_of(turn)]
    if len(users) != 1 or len(answers) != 1 or len(clips) != 1 or clips != clips_of(users[0]):
        return turns
    words = words_of(answers[0])
    if not words:
        return turns
    before = tuple(turn for turn in turns if turn.role in ("system", "scene"))
    return (*before, Turn("user", (Text(words),)), Turn("assistant", tuple(clips), trained=True))


def scene_from_system(turns: Turns) -> Turns:
    """Move the scene out of a system turn that has clips, since chat templates drop clips there.

    Other trainers write it as `<|scene_desc_start|>`, a line each for the scene and the speakers, and
    `<|scene_desc_end|>`.
    """
    if not turns or turns[0].role != "system" or not clips_of(turns[0]):
        return turns
    clips = iter(clips_of(turns[0]))
    text = "".join(part.text if isinstance(part, Text) else CLIP for part in turns[0].parts)
    found = SCENE.fullmatch(text)
    if found is None or CLIP in found[1]:
        return turns
    parts: list[Text | Audio] = []
    for line in filter(None, (line.strip() for line in found[2].splitlines())):
        first, *rest = line.split(CLIP)
        for number, words in enumerate((first, *rest)):
            parts += [next(clips)] if number else []
            parts += [Text(words.strip())] if words.strip() else []
    return (Turn("system", (Text(found[1]),)), Turn("scene", tuple(parts)), *turns[1:])


def clips_into_scene(turns: Turns, default_scene: str | None) -> Turns:
    """Move the clips of user turns that a clip answers into the scene, as the voices of SPEAKER0, SPEAKER1, ...

    There Higgs Audio v2 takes a voice without the words that it speaks. A conversation without a scene gets the default
    one.
    """
    moved: list[Audio] = []
    kept: list[Turn] = []
    for turn, following in zip(turns, (*turns[1:], None), strict=True):
        spoken = following is not None and following.role == "assistant" and clips_of(following)
        if turn.role == "user" and clips_of(turn) and spoken and words_of(turn):
            moved += clips_of(turn)
            kept.append(Turn("user", (Text(words_of(turn)),), turn.trained, turn.fields))
        else:
            kept.append(turn)
    if not moved:
        return turns
    before, scene, behind = _around_scene(kept, default_scene)
    parts = list(scene.parts)
    for number, clip in enumerate(moved, len(clips_of(scene))):
        parts += [Text(f"SPEAKER{number}:"), clip]
    return (*before, Turn("scene", tuple(parts)), *behind)


def _around_scene(turns: Sequence[Turn], default_scene: str | None) -> tuple[Sequence[Turn], Turn, Sequence[Turn]]:
    """Split a conversation at its scene, which may be in the text of its system turn, or be the default one."""
    at = 1 if turns[0].role == "system" else 0
    if turns[at].role == "scene":
        return turns[:at], turns[at], turns[at + 1 :]
    written = SCENE.fullmatch(words_of(turns[0])) if at else None
    if written is not None:
        return [Turn("system", (Text(written[1]),))], Turn("scene", (Text(written[2].strip()),)), turns[at:]
    return turns[:at], Turn("scene", (Text(default_scene),) if default_scene else ()), turns[at:]
