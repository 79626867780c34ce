"""Opinions about films, made up from lists of words: what the SST-2 study knows before it sees a review.

The words, phrases and frames are general English, written for this file; none was taken from a data set.
They are public, so that what a model learns from them costs no privacy.
"""

from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


PRAISE = _words("""
good great excellent wonderful brilliant superb terrific fantastic amazing marvelous masterful
magnificent outstanding remarkable extraordinary exceptional impressive stunning beautiful
gorgeous lovely elegant graceful lyrical poetic charming delightful enchanting engaging
absorbing gripping compelling riveting thrilling exciting exhilarating suspenseful funny
hilarious witty clever smart intelligent insightful thoughtful profound moving touching poignant
heartfelt heartwarming tender warm sweet sincere honest authentic believable convincing nuanced
subtle rich complex inventive original fresh imaginative creative daring bold ambitious powerful
haunting unforgettable memorable enjoyable entertaining fun lively energetic vibrant colorful
uplifting inspiring satisfying rewarding refreshing likable sympathetic sharp crisp taut
well-made well-acted well-written accomplished assured skillful polished perfect fascinating
captivating mesmerizing hypnotic provocative intriguing surprising affecting humane wise timely
important worthwhile dazzling irresistible
""")

BLAME = _words("""
bad terrible awful horrible dreadful abysmal atrocious poor weak lame mediocre disappointing
dull boring tedious tiresome dreary bland flat lifeless listless lethargic slow plodding
sluggish uninspired unoriginal derivative formulaic predictable generic stale tired trite
hackneyed clichéd contrived forced phony fake artificial hollow empty shallow superficial
pointless meaningless senseless stupid dumb idiotic silly ridiculous absurd ludicrous
preposterous laughable unfunny humorless mirthless annoying irritating grating obnoxious
insufferable unbearable unwatchable painful ugly sloppy clumsy awkward amateurish incompetent
inept messy muddled confusing incoherent incomprehensible disjointed chaotic overlong bloated
overblown pretentious self-indulgent manipulative sentimental sappy maudlin melodramatic preachy
heavy-handed crude vulgar tasteless offensive cheap cynical cold joyless depressing forgettable
unremarkable unconvincing implausible inane vapid wooden stilted charmless soulless worthless
wasted misguided unnecessary unpleasant tepid half-baked thin undercooked crass
""")

THINGS = _words("""
movie film picture story drama comedy thriller documentary romance tale plot script screenplay
dialogue acting performance cast direction adaptation sequel remake debut ending premise
character study satire adventure fable experience ride effort piece portrait cinematography
soundtrack director storytelling
""")

PRAISING = """
a must see
worth seeing
worth the price of admission
one of the best films of the year
a triumph
a masterpiece
a treat
a gem
a joy to watch
a pleasure from start to finish
it works
you will be glad you saw it
i loved every minute
it will stay with you
a feast for the eyes
it hits all the right notes
full of heart and humor
full of life
filled with genuine emotion
it earns its laughs and its tears
keeps you on the edge of your seat
a rare treat
succeeds on every level
a breath of fresh air
it packs a punch
never loses its way
highly recommended
a winner
pure entertainment
the actors are at the top of their game
makes you laugh and think
a fine achievement
it has real charm
a small miracle
an experience to treasure
grabs you and never lets go
it is hard not to be moved
leaves you smiling
there is much to admire here
gets under your skin
a delight for young and old
""".strip().splitlines()

BLAMING = """
a waste of time
not worth the price of admission
one of the worst films of the year
a disaster
a mess
a failure
a bore
a chore to sit through
a complete misfire
it does not work
you will want your money back
i hated every minute
you will forget it by tomorrow
an eyesore
it misses the mark
lacks heart and humor
devoid of life
short on genuine emotion
the jokes fall flat
puts you to sleep
a missed opportunity
fails on every level
nothing we have not seen before
it runs out of steam
loses its way halfway through
skip it
a dud
a slog
the actors have nothing to work with
makes you check your watch
a letdown
it has no charm at all
too long by half
an ordeal
goes nowhere
it is hard to care
leaves you cold
there is little to admire here
tries too hard
wears out its welcome
should have gone straight to video
never comes together
less than the sum of its parts
it never rises above the level of a television show
drags on and on
feels like a bad sitcom
rings false
""".strip().splitlines()

# a, b, c: words of the sentence's own side; x, y: of the other side; n, m: things; p: a phrase of its side.
PLAIN = """
a {a} {n}
an utterly {a} {n}
a {a} and {b} {n}
a {a} , {b} {n}
the {n} is {a}
the {n} is {a} and {b}
this is a {a} {n}
it 's {a} , {b} and {c}
what a {a} {n}
i found the {n} {a}
{a} and {b}
{a} , {b} , {c}
the most {a} {n} in years
a {a} {n} with a {b} {m}
the {n} is {a} , and the {m} is {b}
{a} from beginning to end
it is a {a} {n} , {b} and {c}
a {n} that is both {a} and {b}
the director has made a {a} {n}
{n} so {a} that {p}
a {a} {n} ... {p}
{p}
{p} , and the {n} is {a}
the {n} feels {a}
thanks to a {a} {n} , {p}
so {a}
as {a} as it is {b}
""".strip().splitlines()

MIXED = """
it may be {x} at times , but it is {a}
despite a {x} {n} , the {m} is {a}
{x} as it may sound , the {n} turns out to be {a} and {b}
although the {m} is {x} , the {n} is {a} and {b}
the {m} is {x} , but {p}
for all its {x} moments , {p}
it could have been {x} , but it is {a}
neither {x} nor {y} , it is {a}
the {n} wants to be {x} , but it is {a}
{p} , even if the {n} is a bit {x}
you might expect a {x} {n} ; this one is {a}
more {a} than {x}
a potentially {x} {n} turns out {a}
""".strip().splitlines()

NEGATED = """
the {n} is not {x}
it is never {x}
not a {x} {n}
there is nothing {x} about the {n}
it isn 't {x} or {y}
hardly {x}
far from {x}
never {x} , never {y}
far from a {x} {n}
""".strip().splitlines()


def opinions(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences, each with 1 for praise or 0 for blame, half of each.

    About two thirds say it plainly, a quarter concede something to the other side first, and the rest
    deny the other side's words.
    """
    rng = random.Random(seed)
    made = []
    for i in range(count):
        praise = i % 2 == 1
        own, other, phrases = (PRAISE, BLAME, PRAISING) if praise else (BLAME, PRAISE, BLAMING)
        frames = rng.choices((PLAIN, MIXED, NEGATED), weights=(0.65, 0.23, 0.12))[0]
        a, b, c = rng.sample(own, 3)
        x, y = rng.sample(other, 2)
        n, m = rng.sample(THINGS, 2)
        words = {"a": a, "b": b, "c": c, "x": x, "y": y, "n": n, "m": m, "p": rng.choice(phrases)}
        made.append((rng.choice(frames).format(**words), int(praise)))
    return made
