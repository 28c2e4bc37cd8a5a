"""TensorBoard's files, read without TensorFlow."""

from tensorboardX.proto.event_pb2 import Event


def read_tensorboard(folder):
    """[(tag, step, value or 'image')] from event files."""
    found = []
    for path in sorted(folder.glob("events*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            for value in event.summary.value:
                content = "image" if value.HasField("image") else value.simple_value
                found.append((value.tag, event.step, content))
    return found
