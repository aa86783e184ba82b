"""The demo's task, made by a seeded generator: order notes in plain English to strict records.

A record is one line of JSON with keys of its own, which cannot be guessed from the sentence:

    Record: On 14 March Maria Lopez bought three lamps in Lisbon for 42.50 euros.
    {"type":"sale","customer":"Maria Lopez","item":"lamps","count":3,"city":"Lisbon",
     "date":"14/3","cents":4250}

The test split has its own sentence templates and its own names, items and cities: none of them
occurs in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from qlora_jax.errors import QloraError

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Words:
    """What a split's sentences are made of. Templates are (t, sentence) pairs."""

    templates: tuple[tuple[str, str], ...]
    first_names: tuple[str, ...]
    family_names: tuple[str, ...]
    items: tuple[str, ...]
    cities: tuple[str, ...]


MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

TRAIN = Words(
    templates=(
        ("B", "On {date} {who} bought {n} {items} in {city} for {v} euros."),
        ("B", "{who} from {city} bought {n} {items} on {date} and paid {v} euros."),
        ("B", "{who} ordered {n} {items} on {date} for EUR {v}, to be sent to {city}."),
        ("B", "For {v} euros, {who} bought {n} {items} in {city} on {date}."),
        ("B", "{date}, {city}: {who} orders {n} {items} at a price of {v} euros."),
        ("B", "We sold {n} {items} to {who} in {city} on {date} for {v} euros."),
        ("B", "An order of {n} {items} by {who}, {city}, came in on {date}: €{v}."),
        ("B", "Our shop in {city} sold {who} {n} {items} for €{v} on {date}."),
        ("B", "{n} {items} were ordered by {who} from {city} on {date}, for {v} euros."),
        ("B", "{v} euros were paid by {who} for {n} {items} in {city} on {date}."),
        ("B", "Please book a sale: {n} {items}, {who}, {city}, {date}, {v} euros."),
        ("B", "In {city}, {who} paid €{v} for {n} {items} on {date}."),
        ("B", "{who} would like {n} {items} for {v} euros, delivered to {city} on {date}."),
        ("B", "Sale on {date}. Customer {who}, {city}; {n} {items}; EUR {v}."),
        ("B", "New order from {city}: {who} takes {n} {items} for {v} euros on {date}."),
        ("B", "On {date} in {city}, EUR {v} bought {who} {n} {items}."),
        ("R", "On {date} {who} returned {n} {items} in {city} and got back {v} euros."),
        ("R", "{who} from {city} sent back {n} {items} on {date}, worth {v} euros."),
        ("R", "We refunded {v} euros to {who} on {date} for {n} {items} from {city}."),
        ("R", "{n} {items} came back from {who} in {city} on {date}: refund EUR {v}."),
        ("R", "Return on {date}: {who}, {city}, {n} {items}, €{v}."),
        ("R", "In {city}, {who} returned {n} {items} on {date} for a refund of €{v}."),
        ("R", "{who} sent the {n} {items} back from {city} on {date}, {v} euros."),
        ("R", "A refund of {v} euros went to {who}, {city}, on {date} for {n} {items}."),
        ("R", "{date}, {city}: {who} brings back {n} {items} and gets {v} euros."),
        ("R", "Our shop in {city} took back {n} {items} from {who} on {date} for {v} euros."),
        ("R", "The {n} {items} of {who} from {city} were returned on {date}; we owe EUR {v}."),
        ("R", "Refund EUR {v}, {n} {items}, {city}, {date}, customer {who}."),
        ("R", "For the {n} {items} returned on {date}, {who} in {city} gets {v} euros."),
        ("R", "€{v} back to {who} for {n} {items} that arrived from {city} on {date}."),
    ),
    first_names=(
        "Maria", "James", "Anna", "Peter", "Laura", "David", "Sofia", "Thomas", "Emma", "Daniel",
        "Julia", "Robert", "Clara", "Simon", "Nina", "Victor", "Alice", "Oscar", "Helen",
        "Martin", "Ines", "Felix", "Diana", "Hugo", "Rosa", "Liam", "Teresa", "Adam", "Ruth",
        "Paul", "Agnes", "Bruno", "Carmen", "Dmitri", "Edith", "Fabian", "Gloria", "Harold",
        "Irene", "Jakob", "Karin", "Leo", "Mona", "Nathan", "Olga", "Pablo", "Quentin", "Rebecca",
        "Stefan", "Tina", "Ursula", "Vincent", "Wendy", "Xavier", "Yvonne", "Zoe", "Albert",
        "Beatrice", "Cedric", "Doris", "Erik", "Fiona", "Gustav", "Hannah", "Ivan", "Judith",
        "Klaus", "Linda", "Miguel", "Norah",
    ),
    family_names=(
        "Lopez", "Smith", "Novak", "Jansen", "Rossi", "Weber", "Silva", "Brown", "Keller",
        "Moreau", "Larsen", "Garcia", "Kowalski", "Murphy", "Costa", "Fischer", "Green", "Dubois",
        "Ivanov", "Hill", "Santos", "Baker", "Lind", "Romano", "Cooper", "Vega", "Bauer", "Petit",
        "Okafor", "Tanaka", "Anderson", "Bianchi", "Campbell", "Delgado", "Eriksson", "Fontaine",
        "Gomez", "Hoffmann", "Iversen", "Johnson", "Kaplan", "Laurent", "Mendoza", "Nielsen",
        "Olsen", "Parker", "Quinn", "Ramirez", "Schneider", "Thompson", "Ullmann", "Vargas",
        "Wagner", "Young", "Zimmer", "Abbott", "Becker", "Castro", "Dawson", "Evans", "Fernandez",
        "Gibson", "Huber", "Jensen", "Kim", "Lefebvre", "Meyer", "Nakamura", "Ortiz", "Popov",
        "Richter", "Sanchez", "Turner", "Vogel", "Watson", "Zeller", "Berger", "Duval", "Harris",
        "Moretti",
    ),
    items=(
        "lamps", "chairs", "books", "candles", "mugs", "carpets", "clocks", "bottles", "pillows",
        "tables", "plates", "mirrors", "baskets", "towels", "knives", "radios", "jackets", "pens",
        "blankets", "bicycles", "notebooks", "umbrellas", "spoons", "ladders", "hammers", "tents",
        "buckets", "scarves", "speakers", "drills", "kettles", "sofas", "rings", "watches",
        "tickets", "cakes", "brushes", "guitars", "helmets", "printers", "shoes", "coats",
        "magnets", "trays", "flags", "puzzles", "ropes", "vases", "wallets", "keyboards", "pots",
        "curtains", "rackets", "stamps", "toasters", "maps", "screws", "pumps", "belts", "frames",
    ),
    cities=(
        "Lisbon", "Madrid", "Paris", "Vienna", "Oslo", "Berlin", "Rome", "Dublin", "Prague",
        "Athens", "Warsaw", "Boston", "Toronto", "Geneva", "Milan", "Helsinki", "Chicago", "Lyon",
        "Porto", "Seville", "Hamburg", "Denver", "Glasgow", "Turin", "Bergen", "Krakow",
        "Antwerp", "Barcelona", "Cologne", "Dresden", "Edinburgh", "Florence", "Ghent", "Houston",
        "Istanbul", "Jakarta", "Kyoto", "Liverpool", "Malaga", "Nairobi", "Ottawa", "Palermo",
        "Quito", "Rotterdam", "Salzburg", "Tokyo", "Utrecht", "Valencia", "Winnipeg", "York",
        "Zagreb", "Auckland", "Basel", "Cardiff", "Dallas", "Essen", "Frankfurt", "Granada",
        "Havana", "Innsbruck", "Leipzig", "Manchester", "Nantes", "Orlando", "Phoenix", "Riga",
        "Santiago", "Tallinn", "Venice", "Wellington", "Bologna", "Calgary", "Detroit", "Graz",
        "Lima", "Marseille", "Nice", "Oxford", "Sofia", "Tampa",
    ),
)  # fmt: skip

TEST = Words(
    templates=(
        ("B", "{who} went to {city} on {date} and bought {n} {items} for {v} euros."),
        ("B", "Order for {who} in {city}: {n} {items}, EUR {v}, placed on {date}."),
        ("B", "On {date}, we sold {n} {items} for {v} euros to {who} from {city}."),
        ("B", "Today, {date}, {who} paid {v} euros for {n} {items} in our {city} shop."),
        ("B", "{n} {items} for {who}, sold in {city} on {date} at €{v}."),
        ("R", "{who} returned {n} {items} to our shop in {city} on {date} and received {v} euros."),
        ("R", "On {date}, a refund of EUR {v} for {n} {items} was sent to {who} in {city}."),
        ("R", "From {city}, {who} sent back {n} {items} for {v} euros on {date}."),
    ),
    first_names=(
        "George", "Elena", "Frank", "Sarah", "Oliver", "Grace", "Henry", "Lucy", "Marco", "Jane",
    ),
    family_names=(
        "Taylor", "Schmidt", "Martinez", "Wilson", "Ferrari", "Hansen", "Walker", "Klein", "Clark",
        "Perez",
    ),
    items=(
        "shirts", "cameras", "boxes", "desks", "gloves", "coins", "phones", "cards", "balls",
        "bags",
    ),
    cities=(
        "London", "Amsterdam", "Memphis", "Melbourne", "Miami", "Cleveland", "Seattle",
        "Austin", "Cambridge", "Montreal",
    ),
)  # fmt: skip


def _make_example(words: Words, random: Random) -> dict[str, str]:
    kind, template = random.choice(words.templates)
    first, family = random.choice(words.first_names), random.choice(words.family_names)
    item, city = random.choice(words.items), random.choice(words.cities)
    count = random.randint(2, 9)
    # 28 days, so that every day exists in every month.
    month, day = random.randint(1, 12), random.randint(1, 28)
    cents = random.randint(5, 950) * 100 + random.choice((0, 20, 50, 80, 90, 95, 99))
    name = MONTHS[month - 1]
    sentence = template.format(
        who=f"{first} {family}",
        n=random.choice((str(count), NUMBERS[count - 2])),
        items=item,
        city=city,
        date=random.choice((f"{day} {name}", f"{name} {day}")),
        v=f"{cents // 100}.{cents % 100:02d}",
    )
    record = {
        "type": {"B": "sale", "R": "return"}[kind],
        "customer": f"{first} {family}",
        "item": item,
        "count": count,
        "city": city,
        "date": f"{day}/{month}",
        "cents": cents,
    }
    prompt = f"Record: {sentence[0].upper()}{sentence[1:]}"
    return {"prompt": prompt, "completion": json.dumps(record, separators=(",", ":"))}


def make_examples(split: Split, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different rows {"prompt", "completion"}; a function of split, count and seed."""
    if split not in ("train", "test"):
        raise QloraError(f"split must be 'train' or 'test', not {split!r}")
    random = Random(f"{split}-{seed}")
    words = TRAIN if split == "train" else TEST
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = _make_example(words, random)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers equal to their reference, but for space around them."""
    if len(answers) != len(references) or not references:
        raise QloraError(
            f"need as many answers as references, at least one; "
            f"got {len(answers)} and {len(references)}"
        )
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(references)
