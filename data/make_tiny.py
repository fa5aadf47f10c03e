"""Makes the quickstart data: `data/tiny` (a Llama of 1.8 M parameters) and `data/instructions_tiny.json`.

    pip install torch==2.15.0 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6
    python data/make_tiny.py                 # all of it, about 10 minutes on one core
    python data/make_tiny.py --instructions  # only instructions_tiny.json, in a second
    python data/make_tiny.py --held-out      # print the held-out questions and their answers as JSON

The base model is pretrained on plain prose (facts, little stories, lists, sums) that this file writes from the
tables below. Children in the stories ask questions and may hear the answer, but no prompt template occurs. The
instruction dataset asks about the same facts in the Alpaca format, so finetuning teaches the form of an answer, not
the facts. 101 questions are held out of the dataset (not of the prose); the finetuned model answers most of them.

Everything is drawn from the fixed SEED. Text, tokenizer and dataset are the same on every machine; the weights may
differ in their last bits where the CPU or torch does. All text here is our own work, licensed as the project is.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

SEED = 1337
HERE = Path(__file__).resolve().parent
BOS, EOS = "<s>", "</s>"  # ids 0 and 1

VOCAB_SIZE = 1408
CONFIG = {  # LlamaForCausalLM, in the spelling that transformers 4 and 5 both read
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
STEPS, STEP_TOKENS, PEAK_LR = 1700, 2048, 3e-3
SHORT_BLOCK, LONG_BLOCK = 256, 512  # the last tenth of the steps is long, so that all 512 positions are trained

# ---------------------------------------------------------------------------------------------------------------------
# What the world of the model knows. One entity a line; an empty cell means that nothing is said about it.
# ---------------------------------------------------------------------------------------------------------------------


def table(text):
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


# name | colour | home | food | sound | baby | kind
ANIMALS = table("""
    fox | red | in the forest | mice | | a cub | mammal
    bear | brown | in the mountains | honey | growl | a cub | mammal
    wolf | grey | in the forest | meat | howl | a pup | mammal
    rabbit | grey | in a hole | carrots | | a bunny | mammal
    mouse | grey | in a hole | cheese | squeak | | mammal
    dog | brown | in a house | meat | woof | a puppy | mammal
    cat | black | in a house | fish | meow | a kitten | mammal
    cow | brown | on a farm | grass | moo | a calf | mammal
    sheep | white | on a farm | grass | baa | a lamb | mammal
    pig | pink | on a farm | corn | oink | a piglet | mammal
    horse | brown | on a farm | hay | neigh | a foal | mammal
    goat | white | in the mountains | leaves | | a kid | mammal
    hen | white | on a farm | corn | cluck | a chick | bird
    duck | green | on a pond | bread | quack | a duckling | bird
    swan | white | on a lake | grass | | | bird
    owl | brown | in the forest | mice | hoot | an owlet | bird
    crow | black | in a tree | seeds | caw | | bird
    parrot | green | in the jungle | nuts | | | bird
    penguin | black | on the ice | fish | | a chick | bird
    eagle | brown | in the mountains | rabbits | | | bird
    lion | yellow | in the grassland | meat | roar | a cub | mammal
    tiger | orange | in the jungle | meat | roar | a cub | mammal
    monkey | brown | in the jungle | bananas | | | mammal
    elephant | grey | in the grassland | leaves | | a calf | mammal
    zebra | black and white | in the grassland | grass | | a foal | mammal
    camel | yellow | in the desert | leaves | | a calf | mammal
    snake | green | in the desert | mice | hiss | | reptile
    turtle | green | on a beach | leaves | | | reptile
    lizard | green | in the desert | insects | | | reptile
    frog | green | in a pond | flies | croak | a tadpole | amphibian
    shark | grey | in the sea | fish | | a pup | fish
    whale | blue | in the sea | shrimp | | a calf | mammal
    salmon | pink | in a river | shrimp | | | fish
    bee | yellow | in a hive | honey | buzz | | insect
    ant | black | in a nest | seeds | | | insect
    spider | black | in a web | flies | | | arachnid
""")

# country | capital | continent | language
COUNTRIES = table("""
    France | Paris | Europe | French
    Spain | Madrid | Europe | Spanish
    Italy | Rome | Europe | Italian
    Germany | Berlin | Europe | German
    Portugal | Lisbon | Europe | Portuguese
    Greece | Athens | Europe | Greek
    Poland | Warsaw | Europe | Polish
    Sweden | Stockholm | Europe | Swedish
    Norway | Oslo | Europe | Norwegian
    Denmark | Copenhagen | Europe | Danish
    Finland | Helsinki | Europe | Finnish
    Hungary | Budapest | Europe | Hungarian
    Austria | Vienna | Europe | German
    Ireland | Dublin | Europe | English
    Japan | Tokyo | Asia | Japanese
    China | Beijing | Asia | Chinese
    Korea | Seoul | Asia | Korean
    Thailand | Bangkok | Asia | Thai
    Vietnam | Hanoi | Asia | Vietnamese
    Iran | Tehran | Asia | Persian
    Egypt | Cairo | Africa | Arabic
    Kenya | Nairobi | Africa | Swahili
    Ghana | Accra | Africa | English
    Morocco | Rabat | Africa | Arabic
    Brazil | Brasilia | South America | Portuguese
    Peru | Lima | South America | Spanish
    Chile | Santiago | South America | Spanish
    Cuba | Havana | North America | Spanish
    Canada | Ottawa | North America | English
""")

# food | colour | kind | taste
FOODS = table("""
    banana | yellow | fruit | sweet
    apple | red | fruit | sweet
    lemon | yellow | fruit | sour
    lime | green | fruit | sour
    orange | orange | fruit | sweet
    cherry | red | fruit | sweet
    plum | purple | fruit | sweet
    grape | purple | fruit | sweet
    pear | green | fruit | sweet
    peach | pink | fruit | sweet
    carrot | orange | vegetable | sweet
    potato | brown | vegetable | mild
    tomato | red | vegetable | mild
    onion | white | vegetable | sharp
    cabbage | green | vegetable | mild
    cucumber | green | vegetable | fresh
    pepper | red | vegetable | sharp
    radish | pink | vegetable | sharp
    almond | brown | nut | mild
    walnut | brown | nut | bitter
    olive | black | fruit | bitter
    pumpkin | orange | vegetable | mild
""")

# tool | what it is for
TOOLS = table("""
    hammer | hit nails
    saw | cut wood
    knife | cut bread
    spoon | eat soup
    pen | write letters
    brush | paint walls
    broom | sweep the floor
    needle | sew clothes
    key | open doors
    lamp | light the room
    clock | tell the time
    kettle | boil water
    oven | bake cakes
    pan | cook eggs
    rope | tie boats
    shovel | dig holes
    ladder | reach the roof
    umbrella | stay dry
    towel | dry hands
    bucket | carry water
    ruler | draw lines
    net | catch fish
    candle | light the room
    map | find the way
""")

# job | what they do | where they work
JOBS = table("""
    baker | bakes bread | in a bakery
    teacher | teaches children | in a school
    doctor | helps sick people | in a hospital
    nurse | helps sick people | in a hospital
    farmer | grows food | on a farm
    cook | makes meals | in a kitchen
    pilot | flies planes | at an airport
    sailor | sails ships | at sea
    painter | paints pictures | in a studio
    tailor | sews clothes | in a shop
    gardener | grows flowers | in a garden
    carpenter | makes chairs | in a workshop
    singer | sings songs | on a stage
    dancer | dances for people | on a stage
    judge | decides cases | in a court
    writer | writes books | at a desk
    butcher | cuts meat | in a shop
    miner | digs coal | in a mine
    librarian | keeps books | in a library
    driver | drives a bus | on the road
    vet | helps sick animals | in a clinic
    barber | cuts hair | in a shop
""")

OPPOSITES = table("""
    hot | cold
    big | small
    fast | slow
    old | new
    happy | sad
    light | dark
    wet | dry
    loud | quiet
    full | empty
    open | closed
    hard | soft
    high | low
    long | short
    rich | poor
    strong | weak
    early | late
    near | far
    clean | dirty
    thick | thin
    good | bad
    up | down
    left | right
    day | night
    war | peace
""")

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

# Each relation: the questions, the sentence that answers them, and other ways in which prose says the same.
# {a} is the entity with its article, {x} without, {y} the value.
RELATIONS = {
    "colour": (
        ["What colour is {a}?", "Tell me the colour of {a}."],
        "The colour of {a} is {y}.",
        ["Every {x} is {y}.", "{a} is {y}."],
    ),
    "home": (
        ["Where does {a} live?", "Tell me where {a} lives."],
        "{a} lives {y}.",
        ["The home of {a} is {y}.", "If you look {y}, you may find {a}."],
    ),
    "food": (
        ["What does {a} eat?", "Tell me what {a} eats."],
        "{a} eats {y}.",
        ["The food of {a} is {y}.", "Every {x} likes to eat {y}."],
    ),
    "sound": (
        ["What sound does {a} make?", "Tell me the sound of {a}."],
        "The sound of {a} is {y}.",
        ['"{y}," says the {x}.', "You hear {y} when {a} is near."],
    ),
    "baby": (
        ["What is a baby {x} called?", "Tell me the name of a baby {x}."],
        "A baby {x} is called {y}.",
        ["The mother {x} has {y}.", "When {a} is very young, it is {y}."],
    ),
    "kind": (
        ["What kind of thing is {a}?", "Tell me what kind of thing {a} is."],
        "{a} is a kind of {y}.",
        ["The {x} belongs with every other {y}.", "We call {a} a kind of {y}."],
    ),
    "taste": (
        ["How does {a} taste?", "Tell me how {a} tastes."],
        "{a} tastes {y}.",
        ["The taste of {a} is {y}.", "It is good to eat {a}, for it tastes {y}."],
    ),
    "capital": (
        ["What is the capital of {x}?", "Tell me the capital of {x}."],
        "The capital of {x} is {y}.",
        ["{y} is the capital of {x}.", "Many people in {x} live in the capital, {y}."],
    ),
    "continent": (
        ["Where is {x}?", "Tell me where {x} is."],
        "{x} is in {y}.",
        ["{x} is a country in {y}.", "In {y} there is a country called {x}."],
    ),
    "language": (
        ["What do people in {x} speak?", "Tell me what people in {x} speak."],
        "People in {x} speak {y}.",
        ["In {x} you hear {y} in the street.", "The language of {x} is {y}."],
    ),
    "use": (
        ["What is {a} used for?", "Tell me what {a} is used for."],
        "{a} is used to {y}.",
        ["With {a} you can {y}.", "You need {a} when you want to {y}."],
    ),
    "work": (
        ["What does {a} do?", "Tell me what {a} does."],
        "{a} {y}.",
        ["A person who {y} may be {a}.", "Every day the {x} {y}."],
    ),
    "workplace": (
        ["Where does {a} work?", "Tell me where {a} works."],
        "{a} works {y}.",
        ["You can find {a} {y}.", "The work of {a} is done {y}."],
    ),
    "opposite": (
        ["What is the opposite of {x}?", "Tell me the opposite of {x}."],
        "The opposite of {x} is {y}.",
        ["What is not {x} may be {y}.", "First it was {x}, and then it was {y}."],
    ),
    "sum": (
        ["What is {x}?", "Tell me what {x} is."],
        "{x} is {y}.",
        ["If you count {x}, you get {y}.", "The answer to {x} is {y}."],
    ),
    "next day": (
        ["Which day comes after {x}?", "Tell me the day after {x}."],
        "The day after {x} is {y}.",
        ["{y} comes after {x}.", "When {x} is over, it is {y}."],
    ),
    "next month": (
        ["Which month comes after {x}?", "Tell me the month after {x}."],
        "The month after {x} is {y}.",
        ["{y} comes after {x}.", "When {x} is over, it is {y}."],
    ),
}


def all_facts():
    """[(relation, entity, value)] of the whole world, in a fixed order."""
    facts = []
    for columns, rows in [
        (["colour", "home", "food", "sound", "baby", "kind"], ANIMALS),
        (["capital", "continent", "language"], COUNTRIES),
        (["colour", "kind", "taste"], FOODS),
        (["use"], TOOLS),
        (["work", "workplace"], JOBS),
        (["opposite"], OPPOSITES + [[y, x] for x, y in OPPOSITES]),
    ]:
        facts += [(c, row[0], v) for row in rows for c, v in zip(columns, row[1:]) if v]
    facts += [("sum", f"{NUMBERS[i]} plus {NUMBERS[j]}", NUMBERS[i + j]) for i in range(1, 10) for j in range(1, 10)]
    facts += [("next day", d, DAYS[(i + 1) % 7]) for i, d in enumerate(DAYS)]
    facts += [("next month", m, MONTHS[(i + 1) % 12]) for i, m in enumerate(MONTHS)]
    return facts


FACTS = all_facts()
BY_RELATION = {r: [f for f in FACTS if f[0] == r] for r in RELATIONS}
BY_ENTITY = {x: [f for f in FACTS if f[1] == x] for x in dict.fromkeys(f[1] for f in FACTS)}


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence(template, fact):
    _, x, y = fact
    text = template.format(a=with_article(x), x=x, y=y)
    first = 1 if text.startswith('"') else 0
    return text[:first] + text[first].upper() + text[first + 1 :]


def answer(fact):
    return sentence(RELATIONS[fact[0]][1], fact)


def statement(rng, fact):
    """The fact as prose: half of the time in the words that also make the answer."""
    return answer(fact) if rng.random() < 0.5 else sentence(rng.choice(RELATIONS[fact[0]][2]), fact)


def description(animal):
    name, colour, home, food, _, _, kind = animal
    return sentence("{a} is " + f"{with_article(colour)} {kind}. It lives {home} and eats {food}.", ("", name, ""))


# ---------------------------------------------------------------------------------------------------------------------
# The prose for pretraining. Each function writes one document.
# ---------------------------------------------------------------------------------------------------------------------

NAMES = "Tom Anna Ben Lucy Max Nina Paul Rosa Sam Vera Leo Mia Jack Ella Oscar Ruth Hugo Clara Felix Emma".split()
PLACES = "garden park market school forest river beach kitchen library barn station village".split()
THINGS = "ball book box hat kite drum boat toy coin bag cup chair blanket basket picture stone".split()
MOODS = "happy sad tired hungry proud calm brave kind".split()
COLOURS = "red blue green yellow white black brown pink".split()


def facts_about_one(rng):
    """Everything about one entity, then about another."""
    out = []
    for key in rng.sample(sorted(BY_ENTITY), 3):
        facts = rng.sample(BY_ENTITY[key], len(BY_ENTITY[key]))
        out += [statement(rng, f) for f in facts]
    return " ".join(out)


def facts_of_one_kind(rng):
    """The same relation of many entities."""
    facts = BY_RELATION[rng.choice(sorted(BY_RELATION))]
    facts = rng.sample(facts, min(len(facts), rng.randint(4, 9)))
    if rng.random() < 0.5:
        return " ".join(answer(f) for f in facts)
    return " ".join(statement(rng, f) for f in facts)


def mixed_facts(rng):
    facts = rng.sample(FACTS, rng.randint(5, 10))
    return " ".join(statement(rng, f) for f in facts)


def descriptions(rng):
    return " ".join(description(animal) for animal in rng.sample(ANIMALS, 4))


def short_list(rng):
    """A heading and a list, or a heading and a paragraph, as in a notebook."""
    title, items = rng.choice([
        ("Animals", [r[0] for r in ANIMALS]), ("Countries", [r[0] for r in COUNTRIES]),
        ("Capitals", [r[1] for r in COUNTRIES]), ("Food", [r[0] for r in FOODS]), ("Tools", [r[0] for r in TOOLS]),
        ("Jobs", [r[0] for r in JOBS]), ("Names", NAMES), ("Things", THINGS), ("Colours", COLOURS),
    ])  # fmt: skip
    items = rng.sample(items, rng.randint(3, 8))
    parts = [f"### {title}:\n" + "\n".join(items), f"### {title}:\n" + ", ".join(items[:-1]) + f" and {items[-1]}."]
    text = rng.choice(parts)
    if rng.random() < 0.6:
        text += f"\n\n### {rng.choice(['A story', 'Notes', 'Facts'])}:\n"
        text += rng.choice([story, conversation, mixed_facts])(rng)
    return text


def classroom(rng):
    """Prose about tasks. It holds the words of common prompt templates, in other sentences."""
    a, b = rng.sample(NAMES, 2)
    lines = [
        f"The teacher gave {a} an instruction.",
        "Below is a picture that describes the task.",
        "Below the picture is an instruction that describes a game.",
        f"{a} must write a response to the request.",
        f"{b} wrote a response that completes the task.",
        "A good response appropriately completes the request.",
        f"{b} did the work appropriately and then completes it.",
        "The task is paired with an input that provides further context.",
        f"The note of {b} provides further context.",
        "Write your name below the picture.",
        "Instruction comes first, and then comes the task.",
        "Response comes last.",
        "Input comes from the teacher.",
        f"{a} is paired with {b} for the task.",
        f"The request of {a} describes a {rng.choice(THINGS)}.",
        "An instruction tells us what to do, and an input tells us what to use.",
        "The school paired each child with a friend.",
    ]
    return " ".join(rng.sample(lines, rng.randint(5, 9))) + " " + rng.choice([story, conversation, mixed_facts])(rng)


def question_and_answer(rng, a, b):
    """{a} asks, something else happens, and the answer turns up later; or it does not."""
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    if rng.random() < 0.06:
        animal = rng.choice(ANIMALS)
        question, said = f"Describe {with_article(animal[0])}.", description(animal)
    else:
        fact = rng.choice(FACTS)
        question = sentence(rng.choice(RELATIONS[fact[0]][0]), fact)
        said = answer(fact) if rng.random() < 0.7 else statement(rng, fact)
    asked = rng.choice([
        f'{a} asked {b}, "{question}"',
        f'"{question}" {a} wrote to {b}.',
        f'"{question}" That was on the note of {a}.',
        f"{a} read a question in a book. The question was: {question}",
    ])  # fmt: skip
    meanwhile = rng.choice([
        "",
        f" {b} did not know and went to the {place}.",
        f" {b} said nothing. They sat in the {place} and looked at the {thing}.",
        f" {b} put the {thing} on the chair and thought about it for a long time.",
    ])  # fmt: skip
    told = rng.choice([
        f' "{said}" said {b}.',
        f" Then {a} looked in a book, and there it was.\n\n{said}",
        f" They came to a sign in the {place}. On the sign was written:\n{said}",
        f" {b} wrote a note. {said}",
        f" {b} knew. {said}",
        f" Then {a} lost the {thing}.",
    ])  # fmt: skip
    return asked + meanwhile + told


def conversation(rng):
    """Two children ask each other what they want to know."""
    a, b = rng.sample(NAMES, 2)
    text = f"{a} and {b} met in the {rng.choice(PLACES)}."
    for _ in range(rng.randint(2, 5)):
        text += " " + question_and_answer(rng, a, b)
        a, b = b, a
    return text


def story(rng):
    """A little story. Names, things and places come back, so that the model learns to look back in the text."""
    a, b = rng.sample(NAMES, 2)
    place, other_place = rng.sample(PLACES, 2)
    thing, other_thing = rng.sample(THINGS, 2)
    colour, mood = rng.choice(COLOURS), rng.choice(MOODS)
    food = rng.choice(FOODS)[0]
    beast = with_article(rng.choice(ANIMALS)[0])
    the_beast = beast.split()[1]
    day = rng.choice(DAYS)

    opening = [
        f"One {day} {a} went to the {place} with {b}.",
        f"{a} and {b} were friends. They lived near the {place}.",
        f"There was once a child called {a}. {a} had a {colour} {thing}.",
        f"On {day} it was {rng.choice(['hot', 'cold', 'wet', 'dark'])}, and {a} stayed in the {place}.",
    ]
    events = [
        f"{a} had a {colour} {thing}. {b} liked the {colour} {thing} very much.",
        f'"This is my {thing}," said {a}. "I found the {thing} in the {other_place}."',
        f"They saw {beast} near the {place}. The {the_beast} looked at {a} and ran away.",
        f"{a} gave {with_article(food)} to {b}. {b} ate the {food} and was {mood}.",
        f"{a} put the {thing} and the {other_thing} in the bag. The bag held the {thing} and the {other_thing}.",
        f"Then {a} lost the {other_thing}. {b} looked for the {other_thing} in the {other_place} and found it.",
        f"{b} was {mood}. {a} asked why {b} was {mood}.",
        f"They went from the {place} to the {other_place} and back to the {place}.",
        f"{a} drew a picture of {beast}. {b} said that the picture of the {the_beast} was good.",
        f'"Come to the {other_place}," said {b}. So {a} came to the {other_place}.',
        f'"Look, {beast}!" said {b}. {statement(rng, rng.choice(BY_ENTITY[the_beast]))}',
        f"{a} told {b} about the world. {statement(rng, rng.choice(FACTS))} {statement(rng, rng.choice(FACTS))}",
        f"{b} read in a book. {statement(rng, rng.choice(FACTS))}",
        question_and_answer(rng, a, b),
        question_and_answer(rng, b, a),
    ]
    closing = [
        f"In the evening {a} and {b} went home.",
        f"{a} was {mood} and slept well.",
        f'"Thank you, {a}," said {b}. The end.',
        f"And the {colour} {thing} stayed in the {place}.",
    ]
    return " ".join([rng.choice(opening), *rng.sample(events, rng.randint(3, 6)), rng.choice(closing)])


def documents(rng):
    """An endless stream of documents."""
    kinds = [story, conversation, facts_about_one, facts_of_one_kind, mixed_facts, descriptions, short_list, classroom]
    while True:
        yield rng.choices(kinds, weights=[24, 30, 10, 10, 8, 4, 7, 7])[0](rng)


# ---------------------------------------------------------------------------------------------------------------------
# The instruction dataset
# ---------------------------------------------------------------------------------------------------------------------


def row(instruction, output, input=""):
    return {"instruction": instruction, "input": input, "output": output}


def instructions():
    """(rows of the dataset, held-out rows). A held-out question is not asked in the dataset in other words either."""
    rng = random.Random(SEED + 1)
    rows, held_out = [], []
    for relation, facts in BY_RELATION.items():
        facts = rng.sample(facts, len(facts))
        n_held = max(1, len(facts) // 5)
        for i, f in enumerate(facts[: n_held + 20]):
            if i < n_held and i >= 8:
                continue  # enough questions of this kind to check
            r = row(sentence(rng.choice(RELATIONS[relation][0]), f), answer(f))
            (held_out if i < n_held else rows).append(r)
            if relation == "sum":
                a, b = f[1].split(" plus ")
                (held_out if i < 2 else rows if i >= n_held and i % 2 else []).append(
                    row("Add the two numbers.", answer(f), f"{a} and {b}")
                )
            if relation == "opposite":
                (held_out if i < 2 else rows if i >= n_held and i % 2 else []).append(
                    row("Write the opposite of the word.", answer(f), f[1])
                )
    animals = rng.sample(ANIMALS, len(ANIMALS))
    for i, animal in enumerate(animals[:28]):
        target = held_out if i < 6 else rows
        target.append(row(f"Describe {with_article(animal[0])}.", description(animal)))
    for i, animal in enumerate(rng.sample(ANIMALS, 24)):
        a, b = rng.sample(NAMES, 2)
        beast, place = with_article(animal[0]), rng.choice(PLACES)
        text = rng.choice([
            f"{a} and {b} saw {beast} near the {place}.",
            f"In the {place} there was {beast}, and {a} looked at it.",
            f"{a} drew a picture of {beast} for {b}.",
        ])  # fmt: skip
        (held_out if i < 4 else rows).append(row("Which animal is in the sentence?", f"The animal is {beast}.", text))
    rng.shuffle(rows)
    return rows, held_out


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and pretraining
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def pretrain(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)

    # One long row of tokens: <s> document </s> <s> document </s> ...
    n_tokens = STEPS * STEP_TOKENS + 1
    stream, docs = [], documents(random.Random(SEED + 2))
    while len(stream) < n_tokens:
        batch = [next(docs) for _ in range(500)]
        for encoding in tokenizer.encode_batch(batch):
            stream += encoding.ids + [1]
    stream = torch.tensor(stream[:n_tokens])
    held_out = torch.tensor(sum((tokenizer.encode(next(docs)).ids + [1] for _ in range(200)), [])[: 32 * 256 + 1])

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})).float()
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=PEAK_LR, betas=(0.9, 0.95)
    )

    def loss_of(tokens, block):
        x, y = tokens[:-1].view(-1, block), tokens[1:].view(-1, block)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, VOCAB_SIZE), y.reshape(-1))

    started = time.time()
    for step in range(STEPS):
        lr = PEAK_LR * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr
        block = SHORT_BLOCK if step < STEPS * 0.9 else LONG_BLOCK
        loss = loss_of(stream[step * STEP_TOKENS : (step + 1) * STEP_TOKENS + 1], block)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.time() - started:.0f} s", flush=True)
    with torch.no_grad():
        print(f"validation loss on unseen prose: {loss_of(held_out, 256).item():.3f}")
    return model


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_checkpoint(out):
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    docs = documents(random.Random(SEED))
    tokenizer = train_tokenizer([next(docs) for _ in range(8000)])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    })  # fmt: skip
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    model = pretrain(tokenizer)
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to model.embed_tokens.weight
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", action="store_true", help="write only instructions_tiny.json")
    parser.add_argument("--held-out", action="store_true", help="print the held-out questions as JSON")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: the folder of this file)")
    args = parser.parse_args()

    rows, held_out = instructions()
    if args.held_out:
        print(json.dumps(held_out, indent=2))
        return
    write_json(args.out / "instructions_tiny.json", rows)
    if not args.instructions:
        make_checkpoint(args.out / "tiny")


if __name__ == "__main__":
    main()
