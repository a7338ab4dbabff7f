"""Separating tongue from thought (arXiv 2411.08745): language and concept can be patched apart.

A model translates a word: `Français: "eau" - English: "` -> water. Where inside is *what* to say, and where *in which
language*? Take the residual stream of another prompt S (another word, other languages), put it in place of this
prompt's (T) after block j, and see what is said. From the last token, early layers change nothing, late ones say all
that S would; in between the model says the *target's* concept in the *source's* language: language is fixed first. At
the last token of the word to translate, from layer j on, the patch changes the concept and keeps the language. There
even the *mean* of a concept's latents over several source languages does: so concept and language are separate parts,
z_concept + z_language, not one code per pair. And such a mean can be read out in words, as a definition.

The toy: a GPT trained on translations between six languages cut into two-letter pieces, with a fifth of all (word, pair
of languages) combinations held out; every prompt of the experiments asks for held-out ones. A definition is a category
and two attributes. It can't show the paper's absolute values, nor "latent English".

Tags: [P] the paper, [C] its code, [S] independent summaries, [I] inferred here. "pilot": our runs on seeds 100 and up.
Read on: `probabilities` (every patched measure) -> `World` (words, prompts, pairs) -> `Toy` -> `last`, `concept`,
`define`, `geometry` (the experiments) -> `judge`. The one-pass sweep over layers is `common.sweep`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

import common
import pretrained
from model import GPT, GPTConfig, generate


@dataclass
class Args(common.TrainFlags):
    """patching"""

    presets: ClassVar[dict] = {
        "smoke": dict(steps=10, n_embd=32, n_layer=3, eval_every=10, warmup=2, jobs=1, threads=1, pairs=6, concepts=40)
        | dict(quads=["de-es:fr-fi"], languages=["de", "es", "fr", "fi", "nl"], k=3),
        "toy": {},
        "paper": dict(model="meta-llama/Llama-2-7b-hf", quads=["de-it:fr-es", "it-de:fr-es"], device="cuda"),
    }
    model: str = ""
    """a pretrained model in place of the toy: gemma-3-270m, a Hugging Face id, a folder (paper: Llama-2-7b and six more)"""
    words: str = ""
    """CSV of your own: a column per language code, synonyms in a cell joined by |, the first one used in prompts"""
    languages: list[str] = field(default_factory=lambda: ["en", "fr", "de", "es", "nl", "fi"])
    """of the toy: en fr de es it nl pt fi tr"""
    concepts: int = 120
    """words of each language in the toy, at most 120 (paper: 73 to 101)"""
    tok: list[Literal["chunk", "word", "char"]] = field(default_factory=lambda: ["chunk"])
    """pieces of a word in the toy: two letters, the whole word, one letter; a training run each"""
    quads: list[str] = field(default_factory=list)
    """language quadruples source:target, as de-it:fr-zh (the paper's); default: six for the toy and the real model"""
    pairs: int = 200
    """pairs of concepts for each quadruple (paper: 200)"""
    shots: int = 0
    """examples in a prompt; default 3 for the toy, 5 for a real model (paper: 5)"""
    score: Literal["auto", "first", "word"] = "auto"
    """probability of the word's first token, or of all its tokens; auto: word for the toy, first for a real model"""
    num_patches: int = 0
    """how many layers from j on are patched at the concept token; 0 is all (paper: all)"""
    k: int = 5
    """source languages in a mean latent (paper: 5)"""
    prompts: int = 64
    """prompts in a batch of patched runs"""
    steps: int = 1500
    """optimizer steps"""
    batch_size: int = 32
    """documents in a step"""
    lr: float = 3e-3
    """peak learning rate"""
    weight_decay: float = 0.01
    """of matrices and embeddings"""
    eval_every: int = 300
    """steps between evaluations"""
    n_layer: int = 6
    """blocks (paper: 32)"""
    n_head: int = 4
    """heads"""
    n_embd: int = 96
    """width (paper: 4096)"""


# -------------------------------------------------------------------------------------------------------- the method


def padded(prompts, device):
    """Id lists as one tensor (B, T), padded on the left, and its mask of real tokens."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], dtype=torch.bool, device=device)
    return idx, mask


@torch.no_grad()
def latents(model, prompts, size):
    """The residual stream of each prompt's last token after the embedding and every block: (L + 1, B, C)."""
    parts = [padded(prompts[i : i + size], model.wte.weight.device) for i in range(0, len(prompts), size)]
    return torch.cat([common.residuals(model, *part)[:, :, 0] for part in parts], 1)


def swap(z):
    """Experiment 1 as a step of `common.sweep`: z[j] takes the place of the first column after block j, once.

    z (L + 1, B, n, C): n sources side by side.
    """

    def step(j, x, clean):
        new = clean[:, None].repeat(1, z.shape[2], 1, 1)
        new[:, :, 0] = z[j + 1]
        return torch.cat((x, new), 1)

    return step


def hold(z, most=0):
    """Experiments 2 and 3: bundle j holds z after block j and all later ones (or the first `most` from j on)."""

    def step(j, x, clean):
        n = z.shape[2]
        x = torch.cat((x, clean[:, None].repeat(1, n, 1, 1)), 1)
        first = max(0, j + 2 - most) if most else 0
        x[:, first * n :, 0] = z[j + 1].repeat(1, j + 2 - first, 1)
        return x

    return step


@torch.no_grad()
def probabilities(model, prompts, answers, rho, z, patch, size):
    """P(answer) at the end of every prompt, patched at column rho < 0 after each block: (B, L + 1, n, A).

    answers  for each prompt A answers; an answer is a collection of words, a word a tuple of tokens: their sum.
             One-token words make the paper's first-token score; more tokens are forced one after the other, under the
             patch. The row that forces "ca" serves every word that begins with it
    z        (L + 1, B, n, C) what is put there, by patch = swap or hold
    """
    rows = {}
    for b, options in enumerate(answers):
        for a, words in enumerate(options):
            for word in words:
                rows.setdefault((b, tuple(word[:-1])), []).append((a, word[-1]))
    out, keys = torch.zeros(len(prompts), len(z), z.shape[2], len(answers[0])), sorted(rows)
    for i in range(0, len(keys), size):
        part = keys[i : i + size]
        extra = max(len(forced) for _, forced in part)
        forced = [[*f, *[0] * (extra - len(f))] for _, f in part]  # what stands after the last forced token is not read
        idx, mask = padded([[*prompts[b], *f] for (b, _), f in zip(part, forced)], model.wte.weight.device)
        h = common.sweep(model, idx, patch(z[:, [b for b, _ in part]]), extra - rho, mask)
        for row, (b, f) in zip(h[:, :, -extra - 1 :], part):
            logp = model.unembed(row[:, : len(f) + 1]).float()
            logp = logp - logp.logsumexp(-1, keepdim=True)  # (V, 1 + forced, vocabulary)
            before = sum(logp[:, i, token] for i, token in enumerate(f))
            for a, token in rows[b, f]:
                out[b, :, :, a] += (before + logp[:, len(f), token]).exp().cpu().unflatten(0, out.shape[1:3])
    return out


def plain(z):
    """No patch, in the shape of one: the first of the bundles is the prompt as it is."""
    return lambda j, x, clean: x if j >= 0 else clean[:, None]


def baseline(model, prompts, answers, size):
    """P(answer) of the prompts as they are: (B, A)."""
    nothing = torch.zeros(1, len(prompts), 1, 1, device=model.wte.weight.device)
    return probabilities(model, prompts, answers, -1, nothing, plain, size)[:, 0, 0]


def switch_layers(p):
    """(t_lang, t_conc) of mean probabilities p (L + 1, 4) of C_T^outT, C_T^outS, C_S^outS, C_S^outT; row 0 is j = -1.

    The first j from which the source's language (concept) is likelier than the target's; L if none [I].
    """
    tt, ts, ss, st = np.asarray(p)[:, :4].T
    first = lambda won: int(won.argmax()) - 1 if won.any() else len(p) - 1
    return first(ts + ss > tt + st), first(ss + st > tt + ts)


def band(values, axis=0):
    """Mean and half-width of its 95 % band over pairs, 1.96 sd / sqrt(N) [C]."""
    values = np.asarray(values, float)
    return values.mean(axis), 1.96 * values.std(axis, ddof=1) / values.shape[axis] ** 0.5


def bootstrap(statistic, n, seed=0, draws=2000):
    """95 % interval of statistic(rows), rows resampled from range(n) with replacement."""
    rng = np.random.default_rng(seed)
    return np.percentile([statistic(rng.integers(n, size=n)) for _ in range(draws)], [2.5, 97.5], axis=0)


def variance_split(x):
    """Two-way split of latents x (r, C, L, d): r contexts of C concepts in L languages -> shares of variance (3,).

    X_cl = mean + A_c + B_l + E_cl: concept, language, and what only the pair explains. The noise of contexts, the
    variance inside a cell, is taken out of each term, by as much as it adds in expectation.
    """
    r, C, L, _ = x.shape
    cell = x.mean(0)
    noise = ((x - cell) ** 2).sum() / (C * L * max(1, r - 1)) / r  # of a cell's mean
    mu, a, b = cell.mean((0, 1)), cell.mean(1), cell.mean(0)
    e = cell - a[:, None] - b + mu
    parts = [L * ((a - mu) ** 2).sum() - (C - 1) * noise, C * ((b - mu) ** 2).sum() - (L - 1) * noise]
    parts = torch.stack([*parts, (e**2).sum() - (C - 1) * (L - 1) * noise]).clamp(min=0)
    return parts / parts.sum().clamp(min=1e-30)


# ----------------------------------------------------------------------------------------------- words, prompts, pairs

CODES = "en fr de es it nl pt fi tr".split()
CONCEPTS = """
book/livre/Buch/libro/libro/boek/livro/kirja/kitap/o cloud/nuage/Wolke/nube/nuvola/wolk/nuvem/pilvi/bulut/n
mountain/montagne/Berg/montaña/montagna/berg/montanha/vuori/dağ/n
heart/cœur/Herz/corazón/cuore/hart/coração/sydän/kalp/b day/jour/Tag/día/giorno/dag/dia/päivä/gün/t
star/étoile/Stern/estrella/stella/ster/estrela/tähti/yıldız/n moon/lune/Mond/luna/luna/maan/lua/kuu/ay/n
sun/soleil/Sonne/sol/sole/zon/sol/aurinko/güneş/n village/village/Dorf/pueblo/villaggio/dorp/aldeia/kylä/köy/c
forest/forêt/Wald/bosque/foresta/bos/floresta/metsä/orman/n water/eau/Wasser/agua/acqua/water/água/vesi/su/n
river/rivière/Fluss/río/fiume/rivier/rio/joki/nehir/n fire/feu/Feuer/fuego/fuoco/vuur/fogo/tuli/ateş/n
snow/neige/Schnee/nieve/neve/sneeuw/neve/lumi/kar/n horse/cheval/Pferd/caballo/cavallo/paard/cavalo/hevonen/at/a
dog/chien/Hund/perro/cane/hond/cão/koira/köpek/a cat/chat/Katze/gato/gatto/kat/gato/kissa/kedi/a
bird/oiseau/Vogel/pájaro/uccello/vogel/pássaro/lintu/kuş/a fish/poisson/Fisch/pez/pesce/vis/peixe/kala/balık/a
cow/vache/Kuh/vaca/mucca/koe/vaca/lehmä/inek/a house/maison/Haus/casa/casa/huis/casa/talo/ev/h
door/porte/Tür/puerta/porta/deur/porta/ovi/kapı/h window/fenêtre/Fenster/ventana/finestra/raam/janela/ikkuna/pencere/h
table/table/Tisch/mesa/tavolo/tafel/mesa/pöytä/masa/h chair/chaise/Stuhl/silla/sedia/stoel/cadeira/tuoli/sandalye/h
bed/lit/Bett/cama/letto/bed/cama/sänky/yatak/h bread/pain/Brot/pan/pane/brood/pão/leipä/ekmek/f
milk/lait/Milch/leche/latte/melk/leite/maito/süt/f egg/œuf/Ei/huevo/uovo/ei/ovo/muna/yumurta/f
apple/pomme/Apfel/manzana/mela/appel/maçã/omena/elma/f salt/sel/Salz/sal/sale/zout/sal/suola/tuz/f
cheese/fromage/Käse/queso/formaggio/kaas/queijo/juusto/peynir/f meat/viande/Fleisch/carne/carne/vlees/carne/liha/et/f
tea/thé/Tee/té/tè/thee/chá/tee/çay/f hand/main/Hand/mano/mano/hand/mão/käsi/el/b
foot/pied/Fuß/pie/piede/voet/pé/jalka/ayak/b head/tête/Kopf/cabeza/testa/hoofd/cabeça/pää/baş/b
eye/œil/Auge/ojo/occhio/oog/olho/silmä/göz/b nose/nez/Nase/nariz/naso/neus/nariz/nenä/burun/b
mouth/bouche/Mund/boca/bocca/mond/boca/suu/ağız/b ear/oreille/Ohr/oreja/orecchio/oor/orelha/korva/kulak/b
tooth/dent/Zahn/diente/dente/tand/dente/hammas/diş/b finger/doigt/Finger/dedo/dito/vinger/dedo/sormi/parmak/b
blood/sang/Blut/sangre/sangue/bloed/sangue/veri/kan/b bone/os/Knochen/hueso/osso/bot/osso/luu/kemik/b
tree/arbre/Baum/árbol/albero/boom/árvore/puu/ağaç/p flower/fleur/Blume/flor/fiore/bloem/flor/kukka/çiçek/p
leaf/feuille/Blatt/hoja/foglia/blad/folha/lehti/yaprak/p grass/herbe/Gras/hierba/erba/gras/relva/ruoho/çimen/p
root/racine/Wurzel/raíz/radice/wortel/raiz/juuri/kök/p stone/pierre/Stein/piedra/pietra/steen/pedra/kivi/taş/m
sand/sable/Sand/arena/sabbia/zand/areia/hiekka/kum/m sea/mer/Meer/mar/mare/zee/mar/meri/deniz/n
lake/lac/See/lago/lago/meer/lago/järvi/göl/n island/île/Insel/isla/isola/eiland/ilha/saari/ada/c
rain/pluie/Regen/lluvia/pioggia/regen/chuva/sade/yağmur/n wind/vent/Wind/viento/vento/wind/vento/tuuli/rüzgar/n
ice/glace/Eis/hielo/ghiaccio/ijs/gelo/jää/buz/n gold/or/Gold/oro/oro/goud/ouro/kulta/altın/m
silver/argent/Silber/plata/argento/zilver/prata/hopea/gümüş/m iron/fer/Eisen/hierro/ferro/ijzer/ferro/rauta/demir/m
night/nuit/Nacht/noche/notte/nacht/noite/yö/gece/t morning/matin/Morgen/mañana/mattina/ochtend/manhã/aamu/sabah/t
week/semaine/Woche/semana/settimana/week/semana/viikko/hafta/t year/année/Jahr/año/anno/jaar/ano/vuosi/yıl/t
summer/été/Sommer/verano/estate/zomer/verão/kesä/yaz/t winter/hiver/Winter/invierno/inverno/winter/inverno/talvi/kış/t
king/roi/König/rey/re/koning/rei/kuningas/kral/r queen/reine/Königin/reina/regina/koningin/rainha/kuningatar/kraliçe/r
child/enfant/Kind/niño/bambino/kind/criança/lapsi/çocuk/r mother/mère/Mutter/madre/madre/moeder/mãe/äiti/anne/r
father/père/Vater/padre/padre/vader/pai/isä/baba/r friend/ami/Freund/amigo/amico/vriend/amigo/ystävä/arkadaş/r
city/ville/Stadt/ciudad/città/stad/cidade/kaupunki/şehir/c street/rue/Straße/calle/strada/straat/rua/katu/sokak/c
bridge/pont/Brücke/puente/ponte/brug/ponte/silta/köprü/c church/église/Kirche/iglesia/chiesa/kerk/igreja/kirkko/kilise/c
school/école/Schule/escuela/scuola/school/escola/koulu/okul/c
garden/jardin/Garten/jardín/giardino/tuin/jardim/puutarha/bahçe/c wall/mur/Wand/pared/muro/muur/parede/seinä/duvar/h
roof/toit/Dach/techo/tetto/dak/telhado/katto/çatı/h key/clé/Schlüssel/llave/chiave/sleutel/chave/avain/anahtar/o
knife/couteau/Messer/cuchillo/coltello/mes/faca/veitsi/bıçak/o
spoon/cuillère/Löffel/cuchara/cucchiaio/lepel/colher/lusikka/kaşık/o
bottle/bouteille/Flasche/botella/bottiglia/fles/garrafa/pullo/şişe/o
clock/horloge/Uhr/reloj/orologio/klok/relógio/kello/saat/o
mirror/miroir/Spiegel/espejo/specchio/spiegel/espelho/peili/ayna/o
shoe/chaussure/Schuh/zapato/scarpa/schoen/sapato/kenkä/ayakkabı/o
hat/chapeau/Hut/sombrero/cappello/hoed/chapéu/hattu/şapka/o shirt/chemise/Hemd/camisa/camicia/hemd/camisa/paita/gömlek/o
ship/navire/Schiff/barco/nave/schip/navio/laiva/gemi/o wheel/roue/Rad/rueda/ruota/wiel/roda/pyörä/tekerlek/o
letter/lettre/Brief/carta/lettera/brief/carta/kirje/mektup/o word/mot/Wort/palabra/parola/woord/palavra/sana/kelime/o
song/chanson/Lied/canción/canzone/lied/canção/laulu/şarkı/o war/guerre/Krieg/guerra/guerra/oorlog/guerra/sota/savaş/t
dream/rêve/Traum/sueño/sogno/droom/sonho/uni/rüya/t sword/épée/Schwert/espada/spada/zwaard/espada/miekka/kılıç/o
wolf/loup/Wolf/lobo/lupo/wolf/lobo/susi/kurt/a bear/ours/Bär/oso/orso/beer/urso/karhu/ayı/a
mouse/souris/Maus/ratón/topo/muis/rato/hiiri/fare/a rabbit/lapin/Kaninchen/conejo/coniglio/konijn/coelho/kani/tavşan/a
duck/canard/Ente/pato/anatra/eend/pato/ankka/ördek/a spider/araignée/Spinne/araña/ragno/spin/aranha/hämähäkki/örümcek/a
frog/grenouille/Frosch/rana/rana/kikker/rã/sammakko/kurbağa/a
butter/beurre/Butter/mantequilla/burro/boter/manteiga/voi/tereyağı/f
sugar/sucre/Zucker/azúcar/zucchero/suiker/açúcar/sokeri/şeker/f wine/vin/Wein/vino/vino/wijn/vinho/viini/şarap/f
onion/oignon/Zwiebel/cebolla/cipolla/ui/cebola/sipuli/soğan/f rice/riz/Reis/arroz/riso/rijst/arroz/riisi/pirinç/f
field/champ/Feld/campo/campo/veld/campo/pelto/tarla/c earth/terre/Erde/tierra/terra/aarde/terra/maa/toprak/n
smoke/fumée/Rauch/humo/fumo/rook/fumaça/savu/duman/n skin/peau/Haut/piel/pelle/huid/pele/iho/cilt/b
knee/genou/Knie/rodilla/ginocchio/knie/joelho/polvi/diz/b glass/verre/Glas/vidrio/vetro/glas/vidro/lasi/cam/m
paper/papier/Papier/papel/carta/papier/papel/paperi/kağıt/m ring/anneau/Ring/anillo/anello/ring/anel/sormus/yüzük/o
wing/aile/Flügel/ala/ala/vleugel/asa/siipi/kanat/b nest/nid/Nest/nido/nido/nest/ninho/pesä/yuva/c
"""  # fmt: skip
LABELS = {"en": "English", "fr": "Français", "de": "Deutsch", "es": "Español", "it": "Italiano", "nl": "Nederlands"}
LABELS |= {
    "pt": "Português",
    "fi": "Suomi",
    "tr": "Türkçe",
    "zh": "中文",
    "ru": "Русский",
    "ko": "한국어",
    "ja": "日本語",
}
LABELS |= {"et": "Eesti", "hi": "हिन्दी"}
CATEGORIES = {"a": "animal", "b": "body", "c": "place", "f": "food", "h": "house", "m": "material", "n": "nature"}
CATEGORIES |= {"o": "object", "p": "plant", "r": "person", "t": "time"}


def builtin_words():
    """({language: [[word]] by concept}, [category of each concept]): the 120 concepts above."""
    rows = [entry.split("/") for entry in CONCEPTS.split()]
    return {code: [[row[i]] for row in rows] for i, code in enumerate(CODES)}, [row[-1] for row in rows]


def read_words(path):
    """{language: [[synonyms]] by concept} of a CSV file."""
    import csv

    head, *rows = csv.reader(Path(path).read_text("utf-8").splitlines())
    head = [code.strip() for code in head]
    if unknown := [code for code in head if code not in LABELS]:
        raise ValueError(f"{path}: unknown language {unknown[0]!r}, allowed: {', '.join(LABELS)}")
    for i, row in enumerate(rows, 2):
        if len(row) != len(head) or not all(cell.strip() for cell in row):
            raise ValueError(f"{path}, line {i}: an empty cell, needed: a word in each of {', '.join(head)}")
    return {code: [[w.strip() for w in row[i].split("|")] for row in rows] for i, code in enumerate(head)}


@dataclass
class World:
    """Words of several languages and how prompts are made of them, for any tokenizer."""

    tok: object
    table: dict  # language -> concept -> synonyms
    whole: bool  # score whole words, or first tokens

    def text(self, pair, shots, row, cut=""):
        """A translation prompt that ends in the opening quote of the answer, or with cut="word" after the query [C]."""
        (a, b), word = pair, lambda code, row: self.table[code][row][0]
        lines = [f'{LABELS[a]}: "{word(a, s)}" - {LABELS[b]}: "{word(b, s)}"\n' for s in shots]
        return "".join(lines) + f'{LABELS[a]}: "{word(a, row)}' + ("" if cut else f'" - {LABELS[b]}: "')

    def ids(self, text):
        return self.tok.encode(text, bos=True)

    def rho(self, whole, head):
        """The column, counted from the end of `whole`, of the last token of `head`, which must be its beginning."""
        whole, head = self.ids(whole), self.ids(head)
        if whole[: len(head)] != head:
            raise ValueError(f"the tokenizer merges the end of {self.tok.decode(head[-1:])!r} with what follows")
        return len(head) - len(whole) - 1

    def quoted(self, text):
        """The ids of a text as it is split behind an opening quote."""
        quote, ids = self.tok.encode('"'), self.tok.encode(f'"{text}')
        return ids[len(quote) :] if ids[: len(quote)] == quote else self.tok.encode(text)

    def answer(self, code, row):
        """The words that count as concept `row` in a language: whole, or their first tokens with and without a space."""
        if self.whole:
            return {tuple(self.quoted(w)) for w in self.table[code][row]}
        firsts = [self.quoted(space + w)[0] for w in self.table[code][row] for space in ("", " ")]
        return {(t,) for t in firsts if self.tok.decode([t]).strip()}  # not the bare space token

    def rows(self, pair):
        """Concepts that may be asked for in this pair of languages, and those that may be examples."""
        everything = list(range(len(self.table[pair[0]])))
        return everything, everything

    def few_shot(self, rng, pair, row, n):
        """n concepts as examples for the query `row`, drawn anew for every prompt [C]."""
        pool = [i for i in self.rows(pair)[1] if i != row]
        if len(pool) < n:
            raise ValueError(f"{len(pool)} words for examples in {'-'.join(pair)}, needed: {n}")
        return rng.choice(pool, n, replace=False).tolist()

    def prompts(self, rng, pair, rows, n, cut="", scramble=False):
        """Texts with their own examples for each of `rows`; scramble: the examples' translations are mixed up."""
        texts = []
        for row in rows:
            shots = self.few_shot(rng, pair, row, n)
            text = self.text(pair, shots, row, cut)
            if scramble:
                right = [self.table[pair[1]][s][0] for s in shots]
                for old, new in zip(right, right[1:] + right[:1]):
                    text = text.replace(f'{LABELS[pair[1]]}: "{old}"\n', f'{LABELS[pair[1]]}: "\0{new}"\n', 1)
                text = text.replace("\0", "")
            texts.append(text)
        return texts


def disjoint(answers):
    """No word of an answer is a word of another, nor its beginning."""
    for i, a in enumerate(answers):
        for b in answers[i + 1 :]:
            if any(u[: len(v)] == v or v[: len(u)] == u for u in a for v in b):
                return False
    return True


def draw_pairs(rng, sources, targets, answers_of, n):
    """Up to n pairs (source row, target row) of different concepts, whose answers don't collide [C].

    Returns the pairs, their answers, and a Counter of what was passed over.
    """
    product, passed, pairs = [(s, t) for s in sources for t in targets], Counter(), []
    for i in rng.permutation(len(product)):
        s, t = product[i]
        answers = answers_of(s, t)
        if s == t:
            passed["same concept"] += 1
        elif not all(answers):
            passed["no token"] += 1
        elif not disjoint(answers):
            passed["collision"] += 1
        else:
            pairs.append((s, t, answers))
        if len(pairs) == n:
            break
    return pairs, passed


# ------------------------------------------------------------------------------------------------------------ the toy


class ToyTokenizer:
    """Marks, labels and attributes are one token each; words are cut into pieces of `size` letters."""

    def __init__(self, words, whole, size):
        self.size = size
        self.names = ["<pad>", "<bos>", "\n", '"', ': "', " - ", " = ", *whole]
        self.whole = set(self.names)
        self.names += sorted({piece for word in words for piece in self.cut(word)})
        self.number = {name: i for i, name in enumerate(self.names)}

    def cut(self, word):
        return [word] if word in self.whole else [word[i : i + self.size] for i in range(0, len(word), self.size)]

    def encode(self, text, bos=False):
        parts = re.findall(r': "| - | = |"|\n|[^\s":=-]+', text)  # spaces between attributes are no tokens
        return [1] * bos + [self.number[piece] for part in parts for piece in self.cut(part)]

    def decode(self, ids):
        return "".join(self.names[i] for i in ids)


class Toy(World):
    """The toy's words, attributes and documents, drawn from a seed.

    Held out: for every concept a shuffle of the languages says which one language each word is never translated into.
    So every word misses one partner as input and one as output, and with six languages a fifth of all combinations.
    """

    def __init__(self, args, seed, tok):
        rng, (table, categories) = np.random.default_rng([seed, 1]), builtin_words()
        keep = np.sort(rng.permutation(len(categories))[: args.concepts])
        table = {code: [[table[code][i][0].lower()] for i in keep] for code in args.languages}
        self.facts = [(CATEGORIES[categories[i]], f"x{rng.integers(8)}", f"y{rng.integers(8)}") for i in keep]
        attributes = [f"{name}.{code}" for code in table for name in sorted({n for fact in self.facts for n in fact})]
        words = [word for rows in table.values() for (word,) in rows]
        size = {"char": 1, "chunk": 2, "word": 99}[tok]
        super().__init__(ToyTokenizer(words, [LABELS[c] for c in table] + attributes, size), table, True)
        self.seed, self.held = seed, {}
        for row in range(len(keep)):
            order = list(rng.permutation(args.languages))
            for pair in zip(order, order[1:] + order[:1]):
                self.held.setdefault(pair, []).append(row)
        self.trained = {
            (a, b): [r for r in range(len(keep)) if r not in self.held.get((a, b), ())] for a in table for b in table
        }

    def rows(self, pair):
        return self.held.get(pair, []), self.trained[pair]

    def definition(self, code, row, answer=True):
        """`Label: "word" = category attribute attribute`, all in one language; without them, the question."""
        facts = " ".join(f"{name}.{code}" for name in self.facts[row])
        return f'{LABELS[code]}: "{self.table[code][row][0]}" = ' + (f"{facts}\n" if answer else "")

    def document(self, rng):
        """Ids of a document and which of them count in the loss: the answers. [I: shares of the three kinds]"""
        kind, n, (a, b) = rng.random(), rng.integers(3, 6), rng.choice(list(self.table), 2, replace=False)
        b = a if kind >= 0.85 else b  # 15 % copy, 25 % define, 60 % translate
        ids, counts = [1], [0]
        for row in rng.choice(self.trained[a, b], n, replace=False):
            line = self.definition(a, row) if 0.6 <= kind < 0.85 else self.text((a, b), [row], row)
            line = line[: line.index("\n") + 1]
            split = line.index(" = ") + 3 if " = " in line else line.rindex(': "') + 3
            for part, count in (line[:split], 0), (line[split:], 1):
                new = self.tok.encode(part)
                ids, counts = ids + new, counts + [count] * len(new)
        return ids, counts

    def batch(self, step, args, env):
        """The documents of one step, padded on the right; this rank's share of them."""
        rng = np.random.default_rng([self.seed, 2, step])
        docs = [self.document(rng) for _ in range(args.batch_size)]
        T = max(len(ids) for ids, _ in docs)
        idx, counts = (torch.tensor([part + [0] * (T - len(part)) for part in parts]) for parts in zip(*docs))
        rows = slice(env.rank, None, env.world)
        return {"idx": idx[rows, :-1], "targets": idx[rows, 1:], "weights": counts[rows, 1:].float()}


def config_of(args, world):
    """A small Llama without biases, embedding and unembedding tied."""
    plain = dict(norm="rms", tie=True, qkv_bias=False, attn_bias=False, mlp_bias=False)
    return GPTConfig(len(world.tok.names), 256, args.n_layer, args.n_head, args.n_embd, **plain)


def accuracy(model, world, args, n, held):
    """Share of translations that are right to the last piece, greedily, over n prompts of all pairs of languages."""
    rng, texts, right = np.random.default_rng([world.seed, 3]), [], []
    pairs = [(a, b) for a in world.table for b in world.table if a != b]
    for pair in [pairs[i] for i in rng.integers(len(pairs), size=n)]:
        row = int(rng.choice(world.rows(pair)[0 if held else 1]))
        texts += world.prompts(rng, pair, [row], args.shots)
        right.append(world.tok.encode(world.table[pair[1]][row][0] + '"'))
    said = generate(model, [world.ids(t) for t in texts], 12, temperature=0, stop=world.tok.encode('"'))
    return np.mean([a == b for a, b in zip(said, right)])


def train_toy(args, world, name, env, position=0):
    """The toy's model, trained."""
    torch.manual_seed(world.seed)
    model = GPT(config_of(args, world))
    log = common.Log(args.out, name, env)

    def evaluate(step):
        with model.eager():
            return {
                f"accuracy_{k}": accuracy(model, world, args, 128, k == "held_out") for k in ("trained", "held_out")
            }

    common.train(model, lambda step: world.batch(step, args, env), args, env, log, evaluate, position)
    return model
