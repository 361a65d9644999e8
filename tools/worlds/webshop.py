"""WebShop from its published files: products, and what people were asked to buy.

`webshop:items_shuffle_1000.json` (or `items_shuffle.json`); beside it must lie `items_ins_v2_1000.json` (or
`items_ins_v2.json`) and `items_human_ins.json`. The shop itself is ours: SQLite's full-text search takes the place of
Lucene, pages are texts, and the score is the paper's (Yao et al. 2022, equation 1) over normalised words, where the
original also parses titles for nouns and matches fuzzily. Figures are therefore not to be set beside WebShop's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from langchain_core.tools import BaseTool

from tools.search import search_tool
from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.listed import ListedWorld, split_of_file
from tools.worlds.question_files import read_text
from tools.worlds.questions import corpus_file, normalized
from tools.worlds.world import Message

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
    attributes: tuple[str, ...]

    def page(self) -> str:
        options = "".join(f"\n{name}: {' / '.join(values)}" for name, values in self.options)
        return f"[{self.id}] {self.name}\nPrice: ${self.price:.2f}{options}\n{self.text}"


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody was asked to buy."""

    product: Product
    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    highest_price: float


class WebShopEpisode(ToolEpisode):
    """One attempt at one wish."""

    def __init__(self, wish: Wish, products: dict[str, Product], search: BaseTool) -> None:
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
                return self._search.invoke({"query": query, "num_results": 10})
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
        values = dict(product.options).get(option.lower().strip())
        if values is None or value.lower().strip() not in values:
            raise ValueError(f"this product has no {option!r} {value!r}")
        self._chosen[option.lower().strip()] = value.lower().strip()
        return f"Chosen: {option} {value}."

    def outcome(self) -> float:
        """The paper's score of what was bought: 1 where all that was asked for is met."""
        return score(self._wish, self._opened(), self._chosen) if self._bought else 0.0

    def expert_action(self) -> Message | None:
        """Search for the product that the wish was written for, open it, choose and buy."""
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
        return calling("search", {"query": product.name}, self.num_moves)

    def _options_to_choose(self) -> dict[str, str]:
        wanted = [normalized(option) for option in self._wish.options]
        options = self._wish.product.options
        return {name: value for name, values in options for value in values if normalized(value) in wanted}

    def reopened(self) -> WebShopEpisode:
        return WebShopEpisode(self._wish, self._products, self._search)

    def is_where(self, other: WebShopEpisode) -> bool:
        return (self._open, self._chosen, self._bought) == (other._open, other._chosen, other._bought)


def score(wish: Wish, product: Product, chosen: dict[str, str]) -> float:
    """Equation 1 of the paper: the share of attributes, options and the price that fit, less for another kind."""
    text = normalized(f"{product.name} {product.text} {' '.join(product.attributes)}")
    num_attributes = sum(_is_within(normalized(attribute), text) for attribute in wish.attributes)
    picked = [normalized(value) for value in chosen.values()]
    num_options = sum(normalized(option) in picked for option in wish.options)
    fits_price = product.price <= wish.highest_price
    share = (num_attributes + num_options + fits_price) / (len(wish.attributes) + len(wish.options) + 1)
    return share * _kind(wish.product, product)


def _is_within(words: list[str], text: list[str]) -> bool:
    return any(text[at : at + len(words)] == words for at in range(len(text) - len(words) + 1))


def _kind(wanted: Product, bought: Product) -> float:
    """Whether it is the same kind of thing: by the query it was found with, its categories, or its name."""
    name = set(normalized(wanted.name))
    shared = len(name & set(normalized(bought.name))) / max(1, len(name))
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
        text = read_text(file)
        attributes = _object(file.with_name(file.name.replace("items_shuffle", "items_ins_v2")))
        instructions = _object(file.with_name("items_human_ins.json"))
        try:
            listed = json.loads(text)
            products = {each["asin"]: _product(each, attributes) for each in listed}
            wishes = list(_wishes(products, instructions))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is none of WebShop's: {type(error).__name__} {error}") from error
        self._products = products
        passages = ((f"[{each.id}] {each.name}", f"${each.price:.2f} {each.text}") for each in products.values())
        self._search = search_tool(corpus_file(self.name, passages))
        super().__init__(split_of_file(file, wishes))

    def messages_of(self, item: Wish) -> tuple[Message, ...]:
        return ({"role": "user", "content": item.text},)

    def open_item(self, item: Wish) -> WebShopEpisode:
        return WebShopEpisode(item, self._products, self._search)


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object by product")
    return found


def _product(listed: dict[str, Any], attributes: dict[str, Any]) -> Product:
    features = listed["small_description"]
    features = features if isinstance(features, list) else [features or ""]
    prices = [float(price) for price in re.findall(r"\d+(?:\.\d+)?", (listed.get("pricing") or "").replace(",", ""))]
    options = {
        name.lower(): tuple(each["value"].strip().replace("/", " | ").lower() for each in values)
        for name, values in (listed.get("customization_options") or {}).items()
        if values
    }
    return Product(
        id=listed["asin"],
        name=listed["name"],
        text="\n".join(filter(None, [*features, listed.get("full_description") or ""])),
        query=listed["query"].lower().strip(),
        categories=frozenset(each.strip() for each in listed["product_category"].split("›")),
        price=prices[0] if prices else 100.0,
        options=tuple(options.items()),
        attributes=tuple(attributes.get(listed["asin"], {}).get("attributes", ())),
    )


def _wishes(products: dict[str, Product], instructions: dict[str, Any]) -> Iterator[Wish]:
    for product in products.values():
        for number, asked in enumerate(instructions.get(product.id, ())):
            if not asked["instruction_attributes"]:
                continue
            higher = [step * 10.0 for step in range(1, 100) if step * 10.0 > product.price][1:4]
            highest = Random(f"{product.id}/{number}").choice(higher) if higher else None
            limit = f", and price lower than {highest:.2f} dollars" if highest else ""
            options = asked["instruction_options"]
            yield Wish(
                product,
                asked["instruction"].strip(".") + limit,
                tuple(asked["instruction_attributes"]),
                tuple(options.values() if isinstance(options, dict) else options),
                highest or float("inf"),
            )
