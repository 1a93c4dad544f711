"""Broken inputs: bytes that were changed here and there, and values that stand where others belong."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NASTY_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "", " ", "<image>", "<image><image>", "</s>", "<s>", "<|im_end|>", "USER: x ASSISTANT:", "../../etc/passwd",
            "/etc/passwd", "http://169.254.169.254/",
            "file:///etc/passwd", "data:image/png;base64,AA", "a\0b", "\ud800",
            "\udfff\ud800", "\u202e\u2066",
            "a" * 5000, "${HOME}", "~", "~root", "C:\\x", "\\\\host\\x", "null", "1e999",
            "!!python/object/apply:os.system [true]", "&a [*a, *a]", "{{7*7}}", "<script>alert(1)</script>", "\x1b[31m",
        ]
    ),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(allow_nan=True, allow_infinity=True),
    NASTY_TEXT,
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NASTY_TEXT, inner, max_size=4), max_leaves=8
)


@st.composite
def changed_bytes(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """Draw one of `originals` with some of its bytes replaced, removed, repeated, or put in; or bytes of no origin."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        place = draw(st.integers(0, len(data) - 1))
        end = min(len(data), place + draw(st.integers(1, 24)))
        match draw(st.sampled_from(["replace", "flip", "cut", "end", "repeat", "insert"])):
            case "replace":
                data[place:end] = draw(st.binary(min_size=1, max_size=8))
            case "flip":
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:end]
            case "end":
                del data[place:]
            case "repeat":
                data[place:place] = data[place:end] * draw(st.integers(1, 40))
            case "insert":
                data[place:place] = draw(st.binary(max_size=12))
    return bytes(data)


@st.composite
def changed_value(draw: st.DrawFn, original: Any) -> Any:
    """Draw a value of JSON with something else in one or more of its places."""
    if draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    if isinstance(original, dict) and original:
        key = draw(st.sampled_from(sorted(original)))
        made = dict(original)
        match draw(st.integers(0, 9)):
            case 0:
                made.pop(key)
            case 1:
                made[draw(NASTY_TEXT)] = draw(VALUES)
            case _:
                made[key] = draw(changed_value(original[key]))
        return made
    if isinstance(original, list) and original:
        place = draw(st.integers(0, len(original) - 1))
        made_list = list(original)
        match draw(st.integers(0, 5)):
            case 0:
                del made_list[place]
            case 1:
                made_list.append(made_list[place])
            case _:
                made_list[place] = draw(changed_value(original[place]))
        return made_list
    return draw(SCALARS)
