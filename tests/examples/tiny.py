"""Small texts, and the options of small runs, for the tests of the task examples."""

MOODS = {"neg": ("bad", "poor", "awful"), "pos": ("good", "fine", "great")}
SUBJECTS = ("film", "book", "plot", "cast")
WORDS = (*MOODS["neg"], *MOODS["pos"], *SUBJECTS, "the", "was", "very", "un", "##real")

SMALL = "--epochs 2 --batch-size 12 --micro-batch-size 5 --max-length 12"
"""Options of every example that make its run one of seconds."""


def sentence(i: int) -> tuple[str, str]:
    """The i-th text and its label."""
    label = ("neg", "pos")[i % 2]
    mood, subject = MOODS[label][i % 3], SUBJECTS[i // 2 % 4]
    return f"the {subject} was {'very ' * (i % 4)}{mood}", label
