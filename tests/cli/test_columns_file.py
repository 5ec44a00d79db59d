"""The columns of a log are named in a file of their own."""

import json
from pathlib import Path

from genrec.cli import main

COLUMNS = Path(__file__).parents[2] / "configs" / "columns.yaml"
SALES = "customer,sku,score,bought_at,kind,quantity,shop,device\n" + "".join(
    f"c{n % 3},s{n % 4},{n},{n},{'buy' if n % 5 else 'return'},{n % 2 + 1},north,{'tv' if n % 2 else 'phone'}\n"
    for n in range(12)
)
PRODUCTS = "sku,product,description\n" + "".join(f"s{n},Product {n},as good as {n}\n" for n in range(4))


def test_columns_and_settings_in_two_files(tmp_path):
    (tmp_path / "sales.csv").write_text(SALES)
    (tmp_path / "products.csv").write_text(PRODUCTS)
    settings = f"events: {tmp_path}/sales.csv\nitems: {tmp_path}/products.csv\ntext_dim: 4\ncooccurrence_dim: 4\n"
    (tmp_path / "settings.yaml").write_text(settings)
    files = ["--config", str(COLUMNS), "--config", str(tmp_path / "settings.yaml")]
    assert main(["features", *files, "--out", str(tmp_path / "out"), "--context", "[shop]"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["columns"] == {
        "user": "customer", "item": "sku", "rating": None, "time": "bought_at", "action": "kind",
        "context": ["shop"], "weight": "quantity",
    }  # fmt: skip
    assert (summary["config"]["title"], summary["config"]["text"]) == ("product", ["product", "description"])


def test_a_column_that_is_not_there(tmp_path, capsys):
    (tmp_path / "sales.csv").write_text(SALES.replace("quantity", "number", 1))
    arguments = ["--events", str(tmp_path / "sales.csv"), "--out", str(tmp_path / "out")]
    assert main(["features", "--config", str(COLUMNS), *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "sales.csv has no column 'quantity' for weight; its columns are 'customer', 'sku'" in message
    assert not (tmp_path / "out").exists()
