"""WebShop from its published files: products, and what people were asked to buy.

`webshop:items_shuffle_1000.json` (or `items_shuffle.json`); beside it must lie `items_ins_v2_1000.json` (or
`items_ins_v2.json`) and `items_human_ins.json`. The shop itself is ours: SQLite's full-text search takes the place of
Lucene, pages are texts, and the score is the paper's (Yao et al. 2022, equation 1) over normalised words, where the
original also parses titles for nouns and forgives misspelt words. Figures are therefore not to be set beside WebShop's
own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tools.search import search_tool
from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.listed import ListedWorld, split_of_file
from tools.worlds.published import Published, Text, checked, read_object, read_rows
from tools.worlds.questions import Search, corpus_file, normalized
from tools.worlds.world import Message

LONGEST_ID = 10
"""Of what Amazon calls a product."""

_TEXT = {"type": "string"}
SCHEMAS: list[ToolSchema] = [
    {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": dict.fromkeys(arguments, _TEXT), "required": list(arguments)},
    }
    for name, description, arguments in (
        ("search", "Find products. Give the words that the product's page should contain.", ("query",)),
        ("open_product", "Read a product's page: price, options, features.", ("product_id",)),
        ("choose_option", "Choose one of the open product's options, such as a size.", ("option", "value")),
        ("buy", "Buy the open product with the chosen options. This ends the shopping.", ()),
    )
]


@dataclass(frozen=True, slots=True)
class Product:
    """One thing on sale."""

    id: str
    name: str
    text: str
    query: str
    categories: frozenset[str]
    price: float
    options: tuple[tuple[str, tuple[str, ...]], ...]
    attributes: tuple[str, ...] = ()

    def page(self) -> str:
        options = "".join(f"\n{name}: {' / '.join(values)}" for name, values in self.options)
        return f"[{self.id}] {self.name}\nPrice: ${self.price:.2f}{options}\n{self.text}"


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody was asked to buy."""

    product: Product
    asked: str
    limit: str
    """What is said of the price; empty where any will do."""
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    highest_price: float

    def task(self) -> Hashable:
        """What makes it another task than another wish; the price is drawn by us and does not."""
        return (self.product.id, " ".join(self.asked.split()), self.attributes, self.options)


class WebShopEpisode(ToolEpisode):
    """One attempt at one wish."""

    def __init__(self, wish: Wish, products: dict[str, Product], search: Search) -> None:
        super().__init__()
        self._wish, self._products, self._search = wish, products, search
        self._open: Product | None = None
        self._chosen: dict[str, str] = {}
        self._bought = False
        self._has_searched = False

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        return self._bought

    def schemas(self) -> list[ToolSchema]:
        return SCHEMAS

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        if self._bought:
            raise ValueError("something was bought already")
        match name, arguments:
            case "search", {"query": str(query)}:
                self._has_searched = True
                return self._search.find(json.dumps({"query": query, "num_results": 10}))
            case "open_product", {"product_id": str(id)}:
                if id not in self._products:
                    raise ValueError(f"there is no product {id!r}")
                self._open, self._chosen = self._products[id], {}
                return self._open.page()
            case "choose_option", {"option": str(option), "value": str(value)}:
                return self._choose(self._opened(), option, value)
            case "buy", {}:
                product, self._bought = self._opened(), True
                return f"You have bought {product.name}."
        raise ValueError(f"{name} needs other arguments; they are texts")

    def _opened(self) -> Product:
        if self._open is None:
            raise ValueError("open a product first")
        return self._open

    def _choose(self, product: Product, option: str, value: str) -> str:
        name, wanted = _squeezed(option), _option_value(value)
        if wanted not in dict(product.options).get(name, ()):
            raise ValueError(f"this product has no {option!r} {value!r}")
        self._chosen[name] = wanted
        return f"Chosen: {option} {value}."

    def outcome(self) -> float:
        """The paper's score of what was bought: 1 where all that was asked for is met."""
        return score(self._wish, self._opened(), self._chosen) if self._bought else 0.0

    def expert_action(self) -> Message | None:
        """Search for the product that the wish was written for, open it, choose what meets most of it, and buy."""
        if self._bought:
            return answering("It is bought.")
        product = self._wish.product
        if self._open is product:
            wanted = self._options_to_choose()
            missing = [(name, value) for name, value in wanted.items() if self._chosen.get(name) != value]
            if missing:
                option, value = missing[0]
                return calling("choose_option", {"option": option, "value": value}, self.num_moves)
            return calling("buy", {}, self.num_moves)
        if self._has_searched:
            return calling("open_product", {"product_id": product.id}, self.num_moves)
        return calling(
            "search", {"query": product.name if re.search(r"\w", product.name) else product.id}, self.num_moves
        )

    def _options_to_choose(self) -> dict[str, str]:
        chosen = {}
        for name, values in self._wish.product.options:
            met = {value: [wished for wished in self._wish.options if _meets(name, value, wished)] for value in values}
            best = max(values, key=lambda value: (len(met[value]), value in met[value]))
            if met[best]:
                chosen[name] = best
        return chosen

    def reopened(self) -> WebShopEpisode:
        return WebShopEpisode(self._wish, self._products, self._search)

    def is_where(self, other: WebShopEpisode) -> bool:
        return (self._open, self._chosen, self._bought) == (other._open, other._chosen, other._bought)


def score(wish: Wish, product: Product, chosen: dict[str, str]) -> float:
    """Equation 1 of the paper: the share of attributes, options and the price that fit, less for another kind."""
    text = normalized(f"{product.name} {product.text} {' '.join(product.attributes)}")
    num_attributes = sum(_is_within(normalized(attribute), text) for attribute in wish.attributes)
    num_options = sum(any(_meets(*choice, wished) for choice in chosen.items()) for wished in wish.options)
    fits_price = product.price <= wish.highest_price
    share = (num_attributes + num_options + fits_price) / (len(wish.attributes) + len(wish.options) + 1)
    return share * _kind(wish.product, product)


def _meets(name: str, value: str, wished: str) -> bool:
    """Whether a chosen option is the wished one.

    As in the original, a size must be the same; for any other option it is enough that the words of one are all among
    those of the other.
    """
    words, sought = normalized(value), normalized(wished)
    if name == "size" or not words or not sought:
        return words == sought and (bool(words) or value == _option_value(wished))
    return set(words) <= set(sought) or set(sought) <= set(words)


def _is_within(words: list[str], text: list[str]) -> bool:
    return any(text[at : at + len(words)] == words for at in range(len(text) - len(words) + 1))


def _kind(wanted: Product, bought: Product) -> float:
    """Whether it is the same kind of thing: by the query it was found with, its categories, or its name."""
    name = set(normalized(wanted.name))
    shared = len(name & set(normalized(bought.name))) / len(name) if name else 0.2  # the original's, too
    if shared == 0.0:
        return 0.0
    if shared < 0.1:
        return 0.1
    is_alike = wanted.query == bought.query or len(wanted.categories & bought.categories) >= 2 or shared > 0.2
    return 1.0 if is_alike else 0.5


# --------------------------------------------------------------------------------------------------- world


class WebShop(ListedWorld[Wish]):
    """Every fifth wish is held out, every fifth validates."""

    name = "webshop"

    def __init__(self, file: Path) -> None:
        if not file.name.startswith("items_shuffle"):
            raise ValueError(f"{file} must be called items_shuffle_1000.json or items_shuffle.json, as it is published")
        self._products = _products(file)
        passages = ((f"[{each.id}] {each.name}", f"${each.price:.2f} {each.text}") for each in self._products.values())
        wishes = split_of_file(file, _wishes(self._products, file.with_name("items_human_ins.json")), Wish.task)
        self._search = Search(search_tool(corpus_file(self.name, passages)))
        super().__init__(wishes)

    def messages_of(self, item: Wish) -> tuple[Message, ...]:
        return ({"role": "user", "content": item.asked + item.limit},)

    def open_item(self, item: Wish) -> WebShopEpisode:
        return WebShopEpisode(item, self._products, self._search)


# --------------------------------------------------------------------------------------------------- files


class _OptionValue(Published):
    value: Text


def _as_list(found: Any) -> Any:
    return [] if found is None else [found] if isinstance(found, str) else found


class _ProductRow(Published):
    """A row of `items_shuffle.json`."""

    asin: Text
    name: Text | None
    small_description: Annotated[list[Text], BeforeValidator(_as_list)]
    full_description: Text | None = None
    pricing: Text | None = None
    query: Text
    product_category: Text
    customization_options: Annotated[
        dict[Text, list[_OptionValue] | None], BeforeValidator(lambda found: {} if found in (None, "") else found)
    ] = Field(default_factory=dict)


class _AttributesRow(Published):
    """What `items_ins_v2.json` has for a product."""

    attributes: list[Text] = Field(default_factory=list)


class _WishRow(Published):
    """One of those that `items_human_ins.json` has for a product."""

    instruction: Text
    instruction_attributes: list[Text]
    instruction_options: Annotated[
        list[Text], BeforeValidator(lambda found: list(found.values()) if isinstance(found, dict) else found)
    ]


def _products(file: Path) -> dict[str, Product]:
    """By id. As in the original, of two with one id the first is on sale, and what has no id of Amazon's is not."""
    products: dict[str, Product] = {}
    for row in read_rows(file, _ProductRow):
        if row.asin not in products and row.asin != "nan" and len(row.asin) <= LONGEST_ID:
            products[row.asin] = _product(row)
    attributes_file = file.with_name(file.name.replace("items_shuffle", "items_ins_v2"))
    attributes = read_object(attributes_file)
    for id, product in products.items():
        known = checked(f"{attributes_file}, product {id}", attributes.get(id, {}), _AttributesRow)
        products[id] = replace(product, attributes=tuple(known.attributes))
    return products


def _product(row: _ProductRow) -> Product:
    """Without its attributes, which stand in another file."""
    prices = [float(price) for price in re.findall(r"\d*\.?\d+", (row.pricing or "").replace(",", ""))]
    options: dict[str, dict[str, None]] = {}
    for name, values in row.customization_options.items():
        if values:
            options.setdefault(_squeezed(name), {}).update(dict.fromkeys(_option_value(each.value) for each in values))
    return Product(
        id=row.asin,
        name=row.name or "",
        text="\n".join(filter(None, [*row.small_description, row.full_description or ""])),
        query=row.query.lower().strip(),
        categories=frozenset(each.strip() for each in row.product_category.split("›")),
        price=prices[0] if prices else 100.0,
        options=tuple((name, tuple(values)) for name, values in options.items()),
    )


def _squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def _option_value(text: str) -> str:
    return _squeezed(text.replace("/", " | "))


def _wishes(products: Mapping[str, Product], file: Path) -> Iterator[Wish]:
    instructions = read_object(file)
    for product in products.values():
        listed = instructions.get(product.id, [])
        if not isinstance(listed, list):
            raise ValueError(
                f"{file}, product {product.id}: what people asked for must be a list: docs/WORLDS.md says of what file"
            )
        for number, asked in enumerate(listed):
            row = checked(f"{file}, product {product.id}, row {number + 1}", asked, _WishRow)
            if row.instruction_attributes:
                yield _wish(product, number, row)


def _wish(product: Product, number: int, row: _WishRow) -> Wish:
    higher = [step * 10.0 for step in range(1, 100) if step * 10.0 > product.price][1:4]
    highest = Random(f"{product.id}/{number}").choice(higher) if higher else None
    return Wish(
        product,
        asked=row.instruction.strip("."),
        limit=f", and price lower than {highest:.2f} dollars" if highest else "",
        attributes=tuple(row.instruction_attributes),
        options=tuple(row.instruction_options),
        highest_price=highest or float("inf"),
    )
