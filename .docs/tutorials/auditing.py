# %% [markdown]
# # Audit somebody's router
#
# A router from the Hub comes with tables of certificates. Are they what they claim to be? `rsrouter audit` draws rows again,
# bit for bit where the machine allows it, tests radii against fresh noise, attacks inside the certified balls, and computes every
# radius from its votes. Here is a router that is in this repository; `org/name` in its place audits one from the Hub.

# %%
import os
import shutil

_ = shutil.copytree(os.path.join(os.environ["RSROUTER_ROOT"], "model_cards", "demo"), "theirs")

# %%
# !rsrouter audit theirs --data demo --rows 1 --fresh-votes 500 --attack-steps 3 --seed 0 \
#     --table theirs/certificates/certificates.tsv 2> /dev/null

# %% [markdown]
# Exit status 0 says that all was checked and nothing found, 1 that something was found, 2 that some check could not be made:
# another processor, for instance, rounds its sums differently, and votes are then compared only to within rounding.
#
# ## A table that was tampered with
#
# Let us make one radius larger and leave everything else as it is.

# %%
from pathlib import Path

table = Path("theirs/certificates/certificates.tsv")
lines = table.read_text().splitlines()
cells = lines[1].split("\t")
print("radius was", cells[3])
cells[3] = f"{float(cells[3]) + 0.25:.9f}"
_ = table.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")

# %%
# !rsrouter report theirs --out report 2>&1 || echo "exit status $?"

# %% [markdown]
# A report refuses it, and so do `publish` and `audit`: the radius does not follow from the votes of its row. A table whose votes
# were changed as well is found by drawing them again. What an audit can and cannot find is in
# [Publish](../guide/publish.md#let-others-audit-it).
