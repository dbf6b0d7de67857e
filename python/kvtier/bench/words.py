"""Lists of words from which keys, people, firms and facts are drawn."""

from __future__ import annotations

__all__ = ["ADJECTIVES", "CITIES", "FIRMS", "FIRST_NAMES", "INSTRUMENTS", "JOBS", "LAST_NAMES", "NOUNS", "TRADES"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able amber ancient bitter bold brave brief bright calm careful cheerful clever cold curious dapper deep
    distant eager early elegant faint fancy fearless fierce frosty gentle glad golden graceful grand hidden
    hollow honest humble icy jolly keen kind lively lone loud lucky mellow mighty misty modest narrow nimble
    noble odd patient plain polite proud quaint quick quiet rapid rare royal rustic salty shiny silent silver
    sleepy slim smooth solid steady stormy sturdy sunny swift tender tidy tiny vivid warm wild wise witty young
    zesty
    """
)
NOUNS = _words(
    """
    acorn anchor apron badger bakery banjo barrel basket beacon bishop blanket bottle bridge bucket butter
    candle canyon carpet castle cellar cherry chimney clover cobbler comet copper cottage cradle desert donkey
    dragon drummer eagle falcon feather ferry fiddle forest fountain galaxy garden goblet hammer harbor helmet
    island jacket jigsaw kettle kitten ladder lantern lemon lizard magnet maple marble meadow mirror monkey
    mosaic needle orchard otter oven paddle pebble pepper piano pigeon pillow planet pocket puzzle rabbit ribbon
    river saddle sailor shovel spider stable statue tailor temple thistle tunnel turtle valley velvet violin
    walnut whistle willow window
    """
)
FIRST_NAMES = _words(
    """
    Adele Anton Beatrix Bruno Carla Cedric Dagmar Dorian Edith Emil Fiona Florian Gerda Gustav Hanna Hector
    Ingrid Ivan Judith Julian Karin Konrad Leona Lorenz Marta Milo Nadia Nestor Olga Oskar Paula Pierre Renata
    Roland Selma Simon Tamara Tobias Ursula Viktor
    """
)
LAST_NAMES = _words(
    """
    Abbott Albrecht Becker Brandt Castell Coleman Dawson Delgado Eriksen Fairfax Ferrari Garland Gruber Hartley
    Holm Ibsen Jansen Keller Kowal Lambert Lindgren Marlow Moretti Norris Novak Okafor Olsen Palmer Petrov Quinn
    Ramirez Rossi Sandoval Schubert Talbot Tanaka Ullman Vargas Whitaker Zimmer
    """
)
CITIES = _words(
    """
    Amsterdam Athens Barcelona Belgrade Bergen Berlin Bordeaux Boston Brussels Budapest Cairo Chicago Cologne
    Copenhagen Dublin Edinburgh Florence Geneva Glasgow Hamburg Helsinki Istanbul Krakow Lisbon London Lyon
    Madrid Marseille Milan Munich Naples Oslo Paris Porto Prague Rome Seville Sofia Stockholm Tokyo Toronto
    Turin Vienna Warsaw Zurich
    """
)
JOBS = _words(
    """
    architect baker baritone barber botanist butcher carpenter chemist dentist diplomat engineer farmer florist
    geologist historian jeweller journalist judge lawyer librarian mechanic midwife miner painter pharmacist
    photographer physicist pilot plumber potter sculptor surgeon surveyor tailor teacher translator watchmaker
    """
)
INSTRUMENTS = _words(
    """
    accordion bagpipe banjo bassoon cello clarinet cornet drums dulcimer fiddle flute guitar harmonica harp
    harpsichord horn lute mandolin oboe organ piano piccolo recorder saxophone sitar trombone trumpet tuba
    ukulele viola violin xylophone zither
    """
)
TRADES = _words(
    """
    Bakeries Bank Brewery Ceramics Circus Dairies Foundry Glassworks Insurance Mills Optics Textiles Toys
    """
)
FIRMS = _words(
    """
    Acorn Anchor Beacon Castle Comet Copper Eagle Falcon Galaxy Harbor Lantern Maple Meadow Orchard Planet River
    Saddle Temple Valley Willow
    """
)
