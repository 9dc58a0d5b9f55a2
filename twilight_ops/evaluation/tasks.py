"""Long-context tasks with checkable answers: a passkey, and tasks after RULER (arXiv 2404.06654), written anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# Nouns and adjectives for keys and word lists; short, common, and distinct from each other.
ADJECTIVES = (
    "amber bold brave brisk calm clever cosmic crisp dapper eager early faint fancy fierce gentle giant golden happy hollow humble "
    "icy idle jolly keen late lively lucky mellow mighty misty modest nimble noble odd pale plain proud quick quiet rapid rare rosy "
    "royal rustic sharp shy silent silver sleepy sly smooth snowy solid steady still stout sunny sweet swift tall tame tidy tiny vast "
    "vivid warm wild wise witty"
).split()
NOUNS = (
    "acorn anchor apple arrow badger banjo barrel basket beacon beetle bell berry bishop blanket boat bottle bridge bucket button "
    "cabin camel candle canyon carpet castle cedar cherry chisel cloud clover comet copper coral cottage crane cricket crown dagger "
    "daisy desert dragon drum eagle ember falcon feather fiddle forest fountain fox garden ginger glacier goose granite hammer harbor "
    "hazel helmet heron honey island ivory jacket jungle kettle kitten ladder lagoon lantern lemon lizard lobster magnet maple marble "
    "meadow mirror monkey mountain needle nutmeg ocean olive orchid otter owl paddle panther parrot pebble pepper pillow planet poppy "
    "puzzle rabbit raven ribbon river rocket saddle salmon shadow shell shovel sparrow spider statue stone sugar temple thistle "
    "thunder tiger timber tulip turtle tunnel valley velvet violet walnut wagon whistle willow window winter wizard zebra"
).split()


@dataclass(frozen=True)
class Sample:
    """A prompt and the strings that a right answer contains, all of them for full marks."""

    prompt: str
    answer_start: str  # what the answer is made to begin with, so that a small model stays on the subject
    answers: tuple[str, ...]
    chat: bool = True  # asked through the model's chat template, if it has one


@dataclass(frozen=True)
class Task:
    """A task: `build` makes a sample from (random, count of filler units, depth 0..1, prose sentences)."""

    name: str
    new_tokens: int
    build: Callable[[random.Random, int, float, Sequence[str]], Sample]


def score(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the text, letter case aside."""
    text = text.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _insert(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """The lines with each needle put in at its depth."""
    lines = list(lines)
    places = sorted(((round(depth * len(lines)), needle) for depth, needle in zip(depths, needles, strict=True)), reverse=True)
    for place, needle in places:
        lines.insert(place, needle)
    return " ".join(lines)


def _cycle(sentences: Sequence[str], count: int) -> list[str]:
    return [sentences[i % len(sentences)] for i in range(count)]


def _passkey(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
    # After the passkey of Landmark Attention (arXiv 2305.16300), in prose instead of repeated filler, and asking for a "secret number":
    # SmolLM2-135M answers "The pass key is" with what a key is, and loses the number beyond 2k tokens by itself.
    key = _number(rng, 5)
    body = _insert(_cycle(prose, units), [f"The secret number of the vault is {key}."], [depth])
    return Sample(f"{body}\n\nWhat is the secret number of the vault?", "The secret number of the vault is", (key,))


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names of two words each, or of three where there are not as many."""
    if count <= len(ADJECTIVES):
        return [" ".join(pair) for pair in zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)]
    pairs = len(ADJECTIVES) * len(NOUNS)
    longer = count > pairs

    def name(i: int) -> str:
        first = [ADJECTIVES[i // pairs]] if longer else []
        return " ".join([*first, ADJECTIVES[i // len(NOUNS) % len(ADJECTIVES)], NOUNS[i % len(NOUNS)]])

    return [name(i) for i in rng.sample(range(pairs * len(ADJECTIVES) if longer else pairs), count)]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _needles(keys: int = 1, values: int = 1, queries: int = 1) -> Callable[[random.Random, int, float, Sequence[str]], Sample]:
    """Magic numbers in prose: `keys` keys with `values` numbers each, of which the numbers of `queries` keys are asked."""

    def build(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
        names = _names(rng, keys)
        numbers = {name: [_number(rng, 5) for _ in range(values)] for name in names}
        needles, depths = [], []
        for name in names:
            for i, number in enumerate(numbers[name]):
                needles.append(f"One of the special magic numbers for {name} is: {number}.")
                # The first number asked for lies at the depth under test, everything else anywhere.
                depths.append(depth if name == names[0] and i == 0 else rng.random())
        wanted = names[:queries]
        return _asked(_insert(_cycle(prose, units), needles, depths), wanted, [number for name in wanted for number in numbers[name]])

    return build


def _asked(body: str, wanted: Sequence[str], numbers: Sequence[str]) -> Sample:
    """The question for the magic numbers of the wanted names."""
    one = len(numbers) == 1
    which = "What is the special magic number" if one else "What are all the special magic numbers"
    prompt = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about them afterwards.\n"
        f"{body}\n{which} for {_listed(wanted)} mentioned in the provided text?"
    )
    subject, verb = ("number", "is") if one else ("numbers", "are")
    return Sample(prompt, f"The special magic {subject} for {_listed(wanted)} mentioned in the provided text {verb}", tuple(numbers))


def _needle_haystack(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
    """A needle among needles: every sentence has a name and a number of its own."""
    names = _names(rng, units + 1)
    needles = [f"One of the special magic numbers for {name} is: {_number(rng, 5)}." for name in names[1:]]
    number = _number(rng, 5)
    body = _insert(needles, [f"One of the special magic numbers for {names[0]} is: {number}."], [depth])
    return _asked(body, names[:1], [number])


def _chain(rng: random.Random, units: int, depth: float, hops: int, avoid: Sequence[str] = ()) -> tuple[str, str, list[str]]:
    """(question after its text, start of the answer, names): a value that `hops` assignments hand on, in filler."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.sample(letters, 5))
        names += [] if name in avoid or name in names else [name]
    value = _number(rng, 5)
    lines = [f"VAR {names[0]} = {value}"] + [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)]
    depths = sorted([depth, *(rng.uniform(depth, 1.0) for _ in range(hops))])
    question = (
        "Memorize and track the chain of variable assignments hidden in the following text.\n"
        f"{_insert([GRASS] * units, lines, depths)}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    return question, f"According to the chain of assignments, {hops + 1} variables are assigned the value {value}, they are:", names


def _variable_tracking(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
    question, start, names = _chain(rng, units, depth, hops=4)
    # RULER shows a solved example first, and so does this: without one, small models do not know what is asked.
    example, example_start, solved = _chain(rng, 4, 0.0, hops=4, avoid=names)
    return Sample(f"{example} {example_start} {' '.join(solved)}\n\n{question}", start, tuple(names))


def _word_list(common: Sequence[str], times: int, rare: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """(question after its list, start of the answer): the common words `times` times each, the rare ones as they are."""
    listed = [*common] * times + [*rare]
    rng.shuffle(listed)
    body = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    question = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
        f"{body}\nQuestion: What are the {len(common)} most common words in the above list?"
    )
    return question, f"The top {len(common)} words that appear most often in the list are:"


def _common_words(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
    # RULER's ratio of 10 to 1, behind a solved example. A long list has more of each word and not more words.
    common, shown = 10, 20
    words = rng.sample([*NOUNS, *ADJECTIVES], len(NOUNS) + len(ADJECTIVES))
    example, answers, rare = words[: common + shown], words[common + shown : shown + 2 * common], words[shown + 2 * common :]
    question, start = _word_list(answers, max(10, round(10 * units / len(rare))), _cycle(rare, max(1, units)), rng)
    solved, solved_start = _word_list(example[:common], 3, example[common:], rng)
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(example[:common], 1))
    return Sample(f"{solved} {solved_start} {answer}\n\n{question}", start, tuple(answers))


def _frequent_words(rng: random.Random, units: int, depth: float, prose: Sequence[str]) -> Sample:
    vocabulary, alpha = 50, 2.0
    words = ["".join(rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(vocabulary)]
    words = list(dict.fromkeys(words))
    weights = [1.0 / (rank + 1) ** alpha for rank in range(1, len(words) + 1)]
    total = sum(weights)
    # Counts after a Zipf law instead of draws from one, so that the order of the top three is certain.
    listed = [word for word, weight in zip(words, weights, strict=True) for _ in range(max(1, round(units * weight / total)))]
    rng.shuffle(listed)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words.\n"
        f"{' '.join(listed)}\nQuestion: What are the three most frequently appeared words in the above coded text?"
    )
    return Sample(prompt, "According to the coded text above, the three most frequently appeared words are:", tuple(words[:3]))


TASKS = {
    task.name: task
    for task in (
        Task("passkey", 12, _passkey),
        Task("needle_single", 16, _needles()),
        Task("needle_multikey", 16, _needles(keys=4)),
        Task("needle_haystack", 16, _needle_haystack),
        Task("needle_multivalue", 40, _needles(values=4)),
        Task("needle_multiquery", 80, _needles(keys=4, queries=4)),
        Task("variable_tracking", 40, _variable_tracking),
        Task("common_words", 120, _common_words),
        Task("frequent_words", 32, _frequent_words),
    )
}


def sentences(text: str) -> list[str]:
    """The sentences of a prose document, blank lines and headings apart."""
    flat = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return [part.strip() + "." for part in flat.split(". ") if part.strip()]


def encode(tokenizer, sample: Sample) -> list[int]:
    """The prompt as the model's chat template wants it, then the start of the answer."""
    if sample.chat and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": sample.prompt}], tokenize=False, add_generation_prompt=True)
        return tokenizer(text + sample.answer_start, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{sample.prompt} {sample.answer_start}")["input_ids"]


def fit(tokenizer, task: Task, tokens: int, depth: float, seed: int, prose: Sequence[str]) -> tuple[list[int], Sample]:
    """The sample with the most filler whose prompt is at most `tokens` long."""

    def build(units: int) -> tuple[list[int], Sample]:
        sample = task.build(random.Random(seed), units, depth, prose)
        return encode(tokenizer, sample), sample

    least = len(build(0)[0])
    if least > tokens:
        raise ValueError(f"lengths: {task.name}: expected at least {least} tokens, got {tokens}")
    # A prompt is nearly linear in its filler, so that few of them are built.
    low, short, high = 0, least, 1
    while (long := len(build(high)[0])) <= tokens:
        more = 1 + (high - low) * (tokens - long) // max(1, long - short)
        low, short, high = high, long, high + min(7 * high, more + more // 32)
    while high - low > 1:
        guess = low + (high - low) * (tokens - short) // (long - short)
        middle = min(max(guess, low + 1), high - 1)
        found = len(build(middle)[0])
        if found <= tokens:
            low, short = middle, found
        else:
            high, long = middle, found
    return build(low)
