"""Speech samples of other trainers as the conversations of a speech model: words first, then the clip that speaks them.

Nothing is invented: a conversation that is none of theirs is returned unchanged.
"""

import re
from collections.abc import Sequence

from rawloop.contracts import Audio, Text, Turn

SCENE = re.compile(r"(.*?)\s*<\|scene_desc_start\|>(.*)<\|scene_desc_end\|>\s*", re.DOTALL)
CLIP = "\0"  # a placeholder for a clip in a text
Turns = tuple[Turn, ...]


def words_before_clip(turns: Turns, recognition: bool = False) -> Turns:
    """Put the words of a conversation's only clip into the user turn, and the clip into the assistant turn.

    Without a user turn, the answer must be the clip and its words (`<audio>words` of ms-swift). With `recognition`, the
    clip may also be in the user turn and its words in the answer. The user's instruction is left out then, since it
    asks a model to listen. Other conversations are returned unchanged.
    """
    before = tuple(turn for turn in turns if turn.role in ("system", "scene"))
    said = [turn for turn in turns if turn not in before]
    clips = said[0].clips if said else []
    roles, words = [turn.role for turn in said], said[-1].words.strip() if said else ""
    reverse = recognition and roles == ["user", "assistant"] and clips == [c for turn in turns for c in turn.clips]
    if len(clips) != 1 or not words or not (roles == ["assistant"] or reverse):
        return turns
    return (*before, Turn("user", (Text(words),)), Turn("assistant", tuple(clips), said[-1].trained))


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
    if found is None or CLIP in found[1] or CLIP in turns[0].words:
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
    before, scene, after = around_scene(kept, default_scene)
    parts = list(scene.parts)
    for number, clip in enumerate(moved, len(scene.clips)):
        parts += [Text(f"SPEAKER{number}:"), clip]
    return (*before, Turn("scene", tuple(parts)), *after)


def with_default_scene(turns: Turns, default_scene: str | None) -> Turns:
    """Give a spoken conversation without instructions of its own the scene that a metadata.json's samples get."""
    spoken = any(turn.trained and turn.clips for turn in turns)
    if not spoken or default_scene is None or turns[0].role in ("system", "scene"):
        return turns
    return (Turn("scene", (Text(default_scene),)), *turns)


def around_scene(turns: Sequence[Turn], default_scene: str | None) -> tuple[Sequence[Turn], Turn, Sequence[Turn]]:
    """Split a conversation at its scene: a turn, a part of the system text, or else the default scene."""
    at = 1 if turns[0].role == "system" else 0
    if turns[at].role == "scene":
        return turns[:at], turns[at], turns[at + 1 :]
    written = SCENE.fullmatch(turns[0].words.strip()) if at else None
    if written is not None:
        return [Turn("system", (Text(written[1]),))], Turn("scene", (Text(written[2].strip()),)), turns[at:]
    return turns[:at], Turn("scene", (Text(default_scene),) if default_scene else ()), turns[at:]
