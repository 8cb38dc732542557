"""The table of formats: how it is written; vLLM's selection itself runs where its CUDA build is installed."""

from benchmarks import vllm_formats as formats

FOUND = {
    device: {
        "bfloat16": [["TRITON", "TritonExperts", False], ["TRITON", "TritonExperts", False]],
        "MXFP4": [["TRITON", "Whole", True], ["", "No MoE backend.", False]],
    }
    for device in formats.DEVICES
}


def test_a_cell_is_a_kernel_and_whether_it_routes_by_itself():
    assert formats.rows(FOUND) == [
        ("bfloat16", *["TritonExperts"] * 4),
        ("MXFP4", *["Whole, routes by itself", "none: No MoE backend."] * 2),
    ]


def test_only_the_table_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    head = formats._line(formats.HEADS)
    page.write_text(f"before\n\n{head}\n|---|\n| old |\n| older |\n\nafter\n")
    formats.write(formats.rows(FOUND)[:1], page)
    assert page.read_text() == f"before\n\n{head}\n|---|\n| bfloat16 |{' TritonExperts |' * 4}\n\nafter\n"


def test_with_sere_no_kernel_of_the_page_routes_by_itself():
    """Which is what the hook needs."""
    lines = formats.FILE.read_text(encoding="utf-8").splitlines()
    start = lines.index(formats._line(formats.HEADS)) + 2
    rows = [line.strip("|").split("|") for line in lines[start : lines.index("", start)]]
    assert len(rows) == 8
    assert all("routes by itself" not in row[column] for row in rows for column in (2, 4))
    assert any("routes by itself" in row[column] for row in rows for column in (1, 3))
