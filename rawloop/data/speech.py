"""Turns speech samples of other trainers' layouts into conversations for a speech model.

The user gives the words, the assistant's clip speaks them. A reference clip is a separate turn or part of the scene.
Nothing is invented: a clip without words is left unchanged, and the family refuses it.
"""

import re
from collections.abc import Sequence

from rawloop.contracts import Audio, Text, Turn

Turns = tuple[Turn, ...]
SCENE = re.compile(r"(.*?)\s*<\|scene_desc_start\|>(.*)<\|scene_desc_end\|>\s*", re.DOTALL)
CLIP = "\0"  # a placeholder for a clip in a text


def answer_with_words(turns: Turns) -> Turns:
    """Split an only answer of a clip and its words (`<audio>words` of ms-swift) into a user and an assistant turn."""
    answers = [turn for turn in turns if turn.role not in ("system", "scene")]
    if len(answers) != 1 or answers[0].role != "assistant" or len(answers[0].clips) != 1:
        return turns
    (answer,) = answers
    words = answer.words.strip()
    if not words:
        return turns
    asked = (Turn("user", (Text(words),)), Turn("assistant", tuple(answer.clips), answer.trained))
    return (*(turn for turn in turns if turn is not answer), *asked)


def recognition_reversed(turns: Turns) -> Turns:
    """Reverse a recognition sample (a clip and an instruction, then its words): the model speaks the words.

    The instruction is left out, since it asks a model to listen.
    """
    users = [turn for turn in turns if turn.role == "user"]
    answers = [turn for turn in turns if turn.role == "assistant"]
    clips = [clip for turn in turns for clip in turn.clips]
    if len(users) != 1 or len(answers) != 1 or len(clips) != 1 or clips != users[0].clips:
        return turns
    words = answers[0].words.strip()
    if not words:
        return turns
    before = tuple(turn for turn in turns if turn.role in ("system", "scene"))
    return (*before, Turn("user", (Text(words),)), Turn("assistant", tuple(clips), trained=True))


def scene_from_system(turns: Turns) -> Turns:
    """Move the scene out of a system turn with clips, since chat templates drop clips there.

    Other trainers write it between `<|scene_desc_start|>` and `<|scene_desc_end|>`, with a line for the scene and for
    each speaker.
    """
    if not turns or turns[0].role != "system" or not turns[0].clips:
        return turns
    clips = iter(turns[0].clips)
    text = "".join(part.text if isinstance(part, Text) else CLIP for part in turns[0].parts)
    found = SCENE.fullmatch(text)
    if found is None or CLIP in found[1]:
        return turns
    parts: list[Text | Audio] = []
    for line in filter(None, (line.strip() for line in found[2].splitlines())):
        for piece in re.split(f"({CLIP})", line):
            if piece == CLIP:
                parts.append(next(clips))
            elif piece.strip():
                parts.append(Text(piece.strip()))
    return (Turn("system", (Text(found[1]),)), Turn("scene", tuple(parts)), *turns[1:])


def clips_into_scene(turns: Turns, default_scene: str | None) -> Turns:
    """Move the clips of user turns before spoken answers into the scene, as the voices of SPEAKER0, SPEAKER1, ...

    There Higgs Audio v2 needs no transcript of a voice. A conversation without a scene gets the default scene.
    """
    moved: list[Audio] = []
    kept: list[Turn] = []
    for turn, answer in zip(turns, (*turns[1:], None), strict=True):
        spoken = answer is not None and answer.role == "assistant" and answer.clips
        words = turn.words.strip()
        if turn.role == "user" and turn.clips and spoken and words:
            moved += turn.clips
            kept.append(Turn("user", (Text(words),), turn.trained, turn.fields))
        else:
            kept.append(turn)
    if not moved:
        return turns
    before, scene, after = _around_scene(kept, default_scene)
    parts = list(scene.parts)
    for number, clip in enumerate(moved, len(scene.clips)):
        parts += [Text(f"SPEAKER{number}:"), clip]
    return (*before, Turn("scene", tuple(parts)), *after)


def _around_scene(turns: Sequence[Turn], default_scene: str | None) -> tuple[Sequence[Turn], Turn, Sequence[Turn]]:
    """Split a conversation at its scene: a turn, a part of the system text, or else the default scene."""
    at = 1 if turns[0].role == "system" else 0
    if turns[at].role == "scene":
        return turns[:at], turns[at], turns[at + 1 :]
    written = SCENE.fullmatch(turns[0].words.strip()) if at else None
    if written is not None:
        return [Turn("system", (Text(written[1]),))], Turn("scene", (Text(written[2].strip()),)), turns[at:]
    return turns[:at], Turn("scene", (Text(default_scene),) if default_scene else ()), turns[at:]
