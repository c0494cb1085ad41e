"""Writes examples/questions.jsonl: questions about a dozen short texts, in both kinds of rows.

    python examples/make_questions.py [OUT.jsonl]

Every prompt begins with the same instructions, and all questions about a text share that text: two levels of
sharing. Rows are shuffled, as rows of a real job are; the same file comes out every time.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

INSTRUCTIONS = (
    "You answer questions about a short text. Use only what the text says; if it does not say, answer "
    '"not stated". Answer in one short sentence, without repeating the question, and give numbers with their '
    "units."
)

TEXTS = {
    "honeybees": """\
A honeybee colony in summer holds one queen, a few hundred drones and up to fifty thousand workers. The
queen lays as many as two thousand eggs a day, each into its own wax cell. Workers, all of them female,
change jobs as they age: in the first days they clean cells, then they feed larvae, build comb and guard
the entrance, and only in the last weeks of their short lives do they fly out to forage. A summer worker
lives about six weeks; one born in autumn may live six months, because it hardly flies. Foragers that find
a rich patch of flowers return and dance on the comb. The angle of the dance from the vertical gives the
direction of the flowers from the sun, and the length of its waggling run gives the distance. To make a
pound of honey the colony visits roughly two million flowers. Nectar arrives as thin as sugar water; bees
fan it with their wings until less than a fifth of it is water, and then seal the cell with wax. In winter
the bees do not sleep. They form a tight ball around the queen, shiver to keep its middle warm, and eat
the honey that they stored.""",
    "lighthouses": """\
Before radio, a sailor who neared a coast at night had little but lighthouses to tell where he was. The
first lights were open fires of wood or coal on a hill, and they smoked, flickered and went out in the
rain. Oil lamps behind glass were steadier but weak, since most of their light went up into the sky. In
the 1820s the French engineer Augustin Fresnel cut a lens into rings of prisms, each of which bends the
light a little more than the one inside it. Such a lens is thin and light, yet it gathers nearly all the
rays of a lamp into one flat beam that can be seen more than thirty kilometres away. To tell one tower
from another, lights were given characters: one flashes twice every ten seconds, another shines for five
seconds and is dark for five. The heavy lenses floated in a trough of mercury so that clockwork could turn
them, and a keeper wound the weight up every few hours. By day the paint does the same work, and stripes
or bands name the tower. Today almost every light runs by itself, and most keepers left in the second half
of the twentieth century.""",
    "tides": """\
The sea rises and falls twice a day on most coasts. The moon pulls on the water that faces it more
strongly than on the earth as a whole, and more weakly on the water of the far side, so the ocean bulges
in two places. As the earth turns, a harbour passes through both bulges in a little less than twenty-five
hours, because the moon meanwhile moves on in its orbit. The sun raises tides too, slightly less than half
as high as those of the moon. When sun, moon and earth stand in a line, at new and full moon, the two add
up to spring tides; when they stand at right angles, the neap tides are low. The shape of the coast
matters at least as much. In the middle of the ocean the difference is less than a metre, but in the Bay
of Fundy in Canada a funnel of land squeezes the water until it climbs sixteen metres. The Mediterranean,
nearly closed, hardly has any tide. Friction of the tides slows the earth: the day grows longer by about
two thousandths of a second in a century, and the moon drifts away by almost four centimetres a year.""",
    "bread": """\
Bread needs flour, water, salt and something to raise it. When flour is wetted, two of its proteins join
into gluten, an elastic net that can hold gas; kneading lines up the strands and makes the net stronger.
Yeast is a fungus of a single cell. It eats the sugars that enzymes free from starch and gives off carbon
dioxide, which blows up the bubbles of the dough. In an hour at twenty-five degrees a dough may double,
while in a refrigerator the same rise takes a night and gives more flavour. Sourdough uses no bought yeast
but a starter, a mix of flour and water in which wild yeasts live together with bacteria that make acid.
Salt adds more than taste: it tightens the gluten and slows the yeast. In the oven the gas expands and the
loaf springs up for about ten minutes, until at sixty degrees the starch sets and the yeast dies. The
crust browns only above a hundred and forty degrees, when sugars and proteins react. Steam in the first
minutes keeps the surface soft, so that the loaf can grow. Bread goes stale not mainly because it dries,
but because its starch slowly turns back into crystals, and warming it undoes part of that.""",
    "glaciers": """\
A glacier forms where more snow falls in winter than melts in summer. Year after year the snow is buried,
loses its air and turns into grains called firn, and after some decades, under thirty metres or more of
its own kind, into blue ice. Ice that thick flows. It creeps like very stiff honey, and where the ground
is wet it also slides, so that most valley glaciers move between a few centimetres and a metre in a day.
The middle moves faster than the sides, which are held back by rock. Where the bed steepens the brittle
top layer cracks into crevasses, rarely deeper than fifty metres. Stones frozen into the bottom grind the
bed like sandpaper and leave scratches and a fine powder, the rock flour that makes mountain lakes milky
green. Ridges of rubble, called moraines, mark how far the ice once reached. About a tenth of the land is
under ice today, nearly all of it in Antarctica and Greenland, and it holds more than two thirds of all
fresh water. If it all melted, the sea would rise by about seventy metres. Air bubbles in old ice keep
samples of the atmosphere: the deepest cores go back eight hundred thousand years.""",
    "bicycles": """\
The first machine with two wheels in a line was built in 1817 by Karl Drais, who pushed himself along with
his feet. Pedals came in the 1860s, fixed to the front wheel. One turn of the pedals was one turn of the
wheel, so makers built the wheel ever larger to go faster, until the rider of a high wheeler sat a metre
and a half above the road and flew over the handlebars whenever he met a stone. The safety bicycle of 1885
ended that: a chain drove the rear wheel, a large sprocket in front and a small one behind did the work of
the big wheel, and both wheels were of equal size. Three years later John Dunlop put air in the tyres of
his son's tricycle, and the shaking stopped. Little has changed in principle since. A rolling bicycle
keeps itself upright, because the front wheel steers into a fall by itself. It is also the thriftiest of
vehicles: on a flat road a rider at fifteen kilometres an hour spends about as much energy as a walker at
five. Above twenty kilometres an hour most of the effort goes into pushing air aside, which is why racers
bend low and ride close behind one another.""",
    "volcanoes": """\
A volcano is a place where melted rock reaches the surface. Below ground it is called magma, above ground
lava. Most volcanoes stand where plates of the earth's crust meet: where one dives under another, water
from the sinking plate lowers the melting point of the rock above, and where two part, hot rock rises and
melts because the pressure falls. A few, such as those of Hawaii, stand in the middle of a plate over a
hot spot. How a volcano erupts depends on its magma. Thin magma with little silica lets its gas escape and
flows quietly for kilometres, building a broad shield. Thick magma with much silica holds the gas until it
bursts, and piles up a steep cone of ash and lava. The worst danger is often not lava, which people can
usually outwalk, but a hot cloud of ash and gas that races downhill at more than a hundred kilometres an
hour. Ash that reaches the high atmosphere can cool the whole earth: after Tambora erupted in 1815, the
next year had no summer in much of Europe and North America. Old ash makes good soil, and for that reason
millions of people farm the slopes of sleeping volcanoes.""",
    "printing": """\
Books in Europe were copied by hand until the middle of the fifteenth century, and a large Bible took a
scribe more than a year. Around 1450 Johannes Gutenberg of Mainz put several old ideas together. He cut
each letter in hard steel, struck the punch into copper, and used the dent as the bottom of a mould into
which he poured an alloy of lead, tin and antimony. The alloy melts at a low temperature and hardly
shrinks, so thousands of letters came out equal in height. Set in lines, locked in a frame and inked with
a sticky mixture of oil and soot, they were pressed on damp paper by a screw press like those used for
grapes. Afterwards the letters went back into their cases and were used again. He printed about a hundred
and eighty copies of his Bible, each of nearly thirteen hundred pages, and lost the business to his
lender. The craft spread fast. By 1500 more than two hundred towns had presses, and some ten million books
had been printed. Movable type itself was older: in China Bi Sheng had made it of baked clay about four
centuries earlier, but a script of thousands of signs gained less from it than an alphabet.""",
    "owls": """\
There are about two hundred and fifty kinds of owls, and most of them hunt at night. Their eyes are so
large that they cannot turn in their sockets, so an owl turns its head instead, as far as two hundred and
seventy degrees. That takes fourteen bones in the neck, twice as many as people have. In real darkness an
owl hunts by ear. The flat discs of its face gather sound, and in many species one ear sits higher than
the other: a rustle from below reaches one ear a trifle louder, a rustle from the left reaches one a
trifle sooner, and a barn owl can strike a mouse under snow that it has never seen. Its prey hears
nothing, since the front edge of the wing feathers is combed, the back edge is fringed, and the surface is
soft as velvet, which breaks up the air that would whistle over any other wing. Small animals are
swallowed whole. Some hours later the owl coughs up a pellet of fur and bones, from which biologists can
tell what it ate. Few owls build nests of their own. They take hollow trees, old nests of crows or quiet
barns, and in years with many mice they raise many more young.""",
    "salt": """\
Salt is sodium and chlorine in equal numbers, locked into a cubic crystal. Every litre of sea water holds
about thirty-five grams of it and its relatives. On warm coasts people let the sea into shallow ponds and
wait: the sun takes the water, the less soluble chalk and gypsum settle in the first ponds, and clean salt
is raked from the last. Elsewhere it is mined from beds that ancient seas left behind, some of them
hundreds of metres thick, or dissolved underground and pumped up as brine. Before refrigerators, salt
decided what a town could eat in winter, since it draws water out of meat and fish and leaves bacteria
nothing to live on. Cities grew rich on it, states taxed it, and in 1930 Gandhi walked nearly four hundred
kilometres to the sea to pick up a lump of it against the law. A human body holds about a quarter of a
kilogram, which nerves need to carry signals and blood needs to keep its pressure. Today less than a tenth
of all salt is eaten. Most goes to factories, which make chlorine and soda of it, and in cold countries
much is spread on roads, because salt water freezes well below zero.""",
    "maps": """\
No flat map can be right. The skin of a ball cannot be spread out without stretching or tearing, so every
map of the earth bends either shapes, areas, distances or directions. In 1569 Gerard Mercator chose to
keep directions. On his map a line of constant compass bearing is straight, which suited sailors very
well, but lands far from the equator swell: Greenland looks as large as Africa, which is in fact fourteen
times its size. Other maps keep areas and squash the shapes. The scale of a map says how many centimetres
on the ground one centimetre on paper stands for. A hiker wants one to twenty-five thousand, where a house
is a dot; a driver is content with one to three hundred thousand. Hills are shown with contour lines that
join points of equal height, and where the lines crowd together the slope is steep. For centuries land was
measured with chains and angles, triangle after triangle; the great survey of India took about seventy
years. Today aeroplanes and satellites take the pictures, and a receiver finds its place within a few
metres from the signals of four satellites, which it compares to learn how long each was on its way.""",
    "coffee": """\
Coffee is the seed of a red fruit that grows on a small evergreen tree. The tree comes from the highlands
of Ethiopia, and people in Yemen were roasting and brewing its seeds by the fifteenth century. Two species
matter: arabica, which likes cool mountains and tastes milder, and robusta, which bears more, stands heat
and disease, and has about twice the caffeine. After the harvest the flesh of the fruit is washed off or
dried in the sun, and what travels by ship is a hard green bean that keeps for a year. Roasting changes
everything. At about two hundred degrees the beans turn brown, lose a sixth of their weight, swell and
crack aloud, and hundreds of scents arise that the green bean did not have. Once ground, they fade within
days. Brewing dissolves about a fifth of the powder: too little tastes sour, too much bitter. Espresso
pushes hot water through fine powder at nine times the pressure of the air in less than half a minute,
while cold brew takes a night. Caffeine keeps us awake because it sits in the places where the body's own
signal of tiredness would dock. Half of it is gone from the blood after about five hours.""",
}

QUESTIONS = {
    "honeybees": (
        "How many workers can a colony hold in summer?",
        "How many eggs can the queen lay in a day?",
        "Which job do workers do last in their lives?",
        "Why does a worker born in autumn live longer?",
        "What does the angle of the dance show?",
        "How many flowers are visited for a pound of honey?",
        "How do bees make nectar thicker?",
        "How does the colony stay warm in winter?",
    ),
    "lighthouses": (
        "What was wrong with open fires as lights?",
        "Who cut a lens into rings of prisms?",
        "How far away could a Fresnel lens be seen?",
        "How did sailors tell one light from another?",
        "What did the lenses float in?",
        "How often did a keeper wind up the weight?",
        "How is a tower recognised by day?",
        "When did most keepers leave?",
    ),
    "tides": (
        "How often does the sea rise on most coasts?",
        "Why are there two bulges of water?",
        "Why does the cycle take longer than twenty-four hours?",
        "How strong are the tides of the sun?",
        "When do spring tides occur?",
        "How high is the tide in the Bay of Fundy?",
        "Why has the Mediterranean hardly any tide?",
        "By how much does the moon drift away in a year?",
    ),
    "bread": (
        "What is gluten?",
        "What does kneading do?",
        "What gas does yeast give off?",
        "How long does a rise in the refrigerator take?",
        "What lives in a sourdough starter?",
        "What does salt do to the dough?",
        "Above which temperature does the crust brown?",
        "Why does bread go stale?",
    ),
    "glaciers": (
        "Where does a glacier form?",
        "What is firn?",
        "How fast do most valley glaciers move?",
        "Why do the sides move more slowly than the middle?",
        "How deep are crevasses?",
        "What makes mountain lakes milky green?",
        "How far would the sea rise if all ice melted?",
        "How far back do the deepest ice cores go?",
    ),
    "bicycles": (
        "Who built the first machine with two wheels in a line?",
        "Why were front wheels made so large?",
        "How high did the rider of a high wheeler sit?",
        "What was new about the safety bicycle?",
        "Who put air in tyres?",
        "Why does a rolling bicycle stay upright?",
        "At which speed does a rider spend as much energy as a walker?",
        "Why do racers ride close behind one another?",
    ),
    "volcanoes": (
        "What is the difference between magma and lava?",
        "Where do most volcanoes stand?",
        "What are the volcanoes of Hawaii an example of?",
        "What kind of magma builds a broad shield?",
        "Why does thick magma burst?",
        "What is often the worst danger?",
        "What happened after Tambora erupted?",
        "Why do people farm the slopes of volcanoes?",
    ),
    "printing": (
        "How long did a scribe need for a large Bible?",
        "Which metals were in the alloy?",
        "Why was the alloy a good choice?",
        "What was the ink made of?",
        "What was the press like?",
        "How many Bibles did Gutenberg print?",
        "How many books had been printed by 1500?",
        "Who made movable type of baked clay?",
    ),
    "owls": (
        "How many kinds of owls are there?",
        "Why does an owl turn its head?",
        "How many bones are in an owl's neck?",
        "What are the flat discs of the face for?",
        "Why does one ear sit higher than the other?",
        "What makes the flight of an owl silent?",
        "What is in a pellet?",
        "Where do owls nest?",
    ),
    "salt": (
        "What is salt made of?",
        "How much salt is in a litre of sea water?",
        "What settles in the first ponds?",
        "How does salt keep meat from spoiling?",
        "How far did Gandhi walk?",
        "How much salt does a human body hold?",
        "What do nerves need salt for?",
        "Why is salt spread on roads?",
    ),
    "maps": (
        "Why can no flat map be right?",
        "What did Mercator choose to keep?",
        "How much larger than Greenland is Africa?",
        "What does the scale of a map say?",
        "Which scale does a hiker want?",
        "What does it mean when contour lines crowd together?",
        "How long did the great survey of India take?",
        "How many satellites does a receiver need?",
    ),
    "coffee": (
        "Where does the coffee tree come from?",
        "Which species has more caffeine?",
        "How long does the green bean keep?",
        "At which temperature are beans roasted?",
        "How much weight do beans lose in roasting?",
        "How much of the powder does brewing dissolve?",
        "At which pressure is espresso made?",
        "How does caffeine keep us awake?",
    ),
}

ABOUT_ANY_TEXT = (
    "What is this text about?",
    "Give the text a title of at most five words.",
    "What is the largest number in the text?",
    "What is the smallest number in the text?",
    "Which person does the text name?",
    "Which place does the text name?",
    "Which year does the text name?",
    "Does the text mention water?",
    "Does the text mention animals?",
    "What surprising fact does the text state?",
    "Which cause and effect does the text explain?",
    "Name one material from the text.",
    "What changed over time, according to the text?",
    "Who would want to read this text?",
    "What does the first sentence say?",
    "What does the last sentence say?",
    "Which question does the text leave open?",
)

PLAIN_TEXTS = frozenset({"owls", "salt", "maps", "coffee"})
"""These become plain rows, the others rows of an OpenAI batch."""


def make_rows() -> list[dict[str, Any]]:
    """All rows, shuffled the same way every time."""
    rows = []
    for name, text in TEXTS.items():
        make_row = _plain_row if name in PLAIN_TEXTS else _chat_row
        text = " ".join(text.split("\n"))
        for number, question in enumerate(QUESTIONS[name] + ABOUT_ANY_TEXT):
            rows.append(make_row(f"{name}-{number:02}", text, question, 16 + number % 9))
    random.Random(0).shuffle(rows)
    return rows


def _chat_row(row_id: str, text: str, question: str, max_tokens: int) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": f"Text:\n{text}\n\nQuestion: {question}"},
    ]
    body = {"model": "default", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return {"custom_id": row_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _plain_row(row_id: str, text: str, question: str, max_tokens: int) -> dict[str, Any]:
    prompt = f"{INSTRUCTIONS}\n\nText:\n{text}\n\nQuestion: {question}\nAnswer:"
    return {
        "id": row_id,
        "prompt": prompt,
        "sampling_params": {"max_new_tokens": max_tokens, "temperature": 0},
    }


def main() -> None:
    """Write the file named on the command line, or the one beside this script."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("questions.jsonl")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows()]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
