import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from transport.frames import (
    MAX_FRAME_BYTES,
    Filled,
    FrameError,
    Left,
    Loaded,
    Missed,
    Ready,
    encode,
    from_receiver,
    from_source,
    open_socket,
)

NUMBERS = st.integers(0, (1 << 63) - 1)
OF_RECEIVERS = (
    st.builds(Ready, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
    | st.builds(Loaded, NUMBERS, NUMBERS)
    | st.builds(Left, NUMBERS)
)
OF_SOURCES = st.builds(Filled, NUMBERS, NUMBERS, st.none() | st.binary(min_size=16, max_size=16)) | st.builds(
    Missed, NUMBERS
)


@given(OF_RECEIVERS, OF_SOURCES)
def test_frames_arrive_as_they_were_sent_and_only_from_their_own_side(one, other):
    assert from_receiver(encode(one)) == one
    assert from_source(encode(other)) == other
    assert len(encode(one)) <= MAX_FRAME_BYTES >= len(encode(other))
    with pytest.raises(FrameError, match="Invalid value"):
        from_source(encode(one))
    with pytest.raises(FrameError, match="Invalid value"):
        from_receiver(encode(other))


@given(OF_RECEIVERS, st.data())
def test_a_truncated_frame_is_refused(frame, data):
    whole = encode(frame)
    with pytest.raises(FrameError):
        from_receiver(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes):
    try:
        frame = from_receiver(data)
    except FrameError:
        return
    assert isinstance(frame, Ready | Loaded | Left)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "Loaded", "ticket": 1}, "missing required field `bucket`"),
        ({"type": "Loaded", "ticket": 1, "bucket": 2, "more": 3}, "unknown field `more`"),
        ({"type": "Loaded", "ticket": "1", "bucket": 2}, "Expected `int`, got `str`"),
        ({"type": "Loaded", "ticket": 1, "bucket": 2.0}, "Expected `int`, got `float`"),
        ({"type": "Loaded", "ticket": True, "bucket": 2}, "Expected `int`, got `bool`"),
        ({"type": "Loaded", "ticket": -1, "bucket": 2}, "Expected `int` >= 0"),
        ({"type": "Loaded", "ticket": 1 << 63, "bucket": 2}, "Expected `int` <= 9223372036854775807"),
        ({"ticket": 1}, "missing required field `type`"),
        ([1, 2], "Expected `object`, got `array`"),
    ],
)
def test_a_frame_of_the_wrong_fields_is_refused(fields: object, message: str):
    with pytest.raises(FrameError, match=message):
        from_receiver(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("seal", [b"", b"\0" * 15, b"\0" * 17, "0123456789abcdef"])
def test_a_seal_has_sixteen_bytes(seal: object):
    with pytest.raises(FrameError, match="seal"):
        from_source(msgspec.msgpack.encode({"type": "Filled", "ticket": 1, "bucket": 2, "seal": seal}))


def test_a_frame_that_is_too_long_is_refused_before_it_is_decoded():
    padded = msgspec.msgpack.encode({"type": "Left", "ticket": 1, "x": b"\0" * MAX_FRAME_BYTES})
    with pytest.raises(FrameError, match=f"a frame of {len(padded)} bytes, at most 512 are allowed"):
        from_receiver(padded)


def test_a_socket_does_not_even_read_a_frame_that_is_too_long(tmp_path):
    ours, theirs = open_socket(zmq.ROUTER), zmq.Context.instance().socket(zmq.DEALER)
    try:
        theirs.linger = 0
        ours.bind(f"ipc://{tmp_path}/socket")
        theirs.connect(f"ipc://{tmp_path}/socket")
        theirs.send(b"\0" * MAX_FRAME_BYTES)
        assert ours.poll(5000) and len(ours.recv_multipart()[1]) == MAX_FRAME_BYTES
        theirs.send(b"\0" * (MAX_FRAME_BYTES + 1))
        assert not ours.poll(300)
    finally:
        ours.close()
        theirs.close()
