"""What messages say: names, values, numbers, files. Their words may change and no test with them."""

import re


def facts(message):
    """The subject of a message, and the names, values, numbers, files and proposals in it."""
    subject, *words = [word.strip(",;:()[]") for word in message.split()]
    told = [word for word in words if re.search(r"[\d_='\"/]|\w\.\w|\?$", word)]
    return [subject, *told]


def assert_mentions(text, *told):
    """All of these are somewhere in a text."""
    missing = [fact for fact in told if str(fact) not in text]
    assert not missing, f"nothing of {missing} in:\n{text}"
