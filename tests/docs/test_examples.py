"""The example data is what examples/README.md says, and every row of it can be computed."""

import csv
import re

from docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def table(name):
    with open(EXAMPLES / name, newline="") as file:
        return list(csv.DictReader(file))


def proteins():
    records = (EXAMPLES / "proteins.fasta").read_text().split(">")[1:]
    return {r.split(None, 1)[0]: "".join(r.splitlines()[1:]) for r in records}


def test_the_table_of_contents_is_right():
    text = (EXAMPLES / "README.md").read_text()
    told = {name: int(rows) for name, rows in re.findall(r"^\| `([\w.]+)` \| (\d+) \|", text, re.M)}
    assert told == {
        "proteins.fasta": len(proteins()),
        "antibodies.csv": len(table("antibodies.csv")),
        "promoters.csv": len(table("promoters.csv")),
    }
    for name, sequences in (
        ("proteins.fasta", list(proteins().values())),
        ("promoters.csv", [row["sequence"] for row in table("promoters.csv")]),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        lengths = sorted(map(len, sequences))
        assert f"; {lengths[0]} to {lengths[-1]} " in line


def test_letters_and_ids():
    antibodies, promoters = table("antibodies.csv"), table("promoters.csv")
    residues = [*proteins().values(), *(row["sequence"] for row in antibodies)]
    assert set("".join(residues)) <= set("ACDEFGHIKLMNPQRSTVWY")
    assert set("".join(row["sequence"] for row in promoters)) <= set("ACGT")
    for ids in (
        list(proteins()),
        *([row["id"] for row in rows] for rows in (antibodies, promoters)),
    ):
        assert len(set(ids)) == len(ids)


def test_masses_of_well_known_proteins():
    """Average masses in dalton, reduced: a mistyped residue would show."""
    known = {
        "P0CG48-UBQ": 8564.8,
        "P00698": 14313.1,
        "P61823": 13690.3,
        "P42212": 26886.3,
        "P69905": 15257.6,
        "P68871": 15998.4,
        "P00974": 6517.5,
        "P01501": 2847.5,
        "P01275-GLC": 3482.8,
        "P0ABQ4": 17999.3,
        "P62805": 11367.3,
        "P01308": 11980.9,
    }
    for name, mass in known.items():
        found = 18.015 + sum(MASSES[letter] for letter in proteins()[name])
        assert abs(found - mass) < 0.5, name


# fmt: off
MASSES = {
    "A": 71.0788, "R": 156.1875, "N": 114.1038, "D": 115.0886, "C": 103.1388, "E": 129.1155,
    "Q": 128.1307, "G": 57.0519, "H": 137.1411, "I": 113.1594, "L": 113.1594, "K": 128.1741,
    "M": 131.1926, "F": 147.1766, "P": 97.1167, "S": 87.0782, "T": 101.1051, "W": 186.2132,
    "Y": 163.1760, "V": 99.1326,
}
# fmt: on
