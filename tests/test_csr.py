"""Page tables in CSR form: in, out, and against attention that knows nothing else."""

import pytest
import torch

from twilight_ops import KV, Always, Budget, Observation, Paging, Policy, Pruning, Shadow, append_kv, decode_attention
from twilight_ops.integration.csr import CSR, csr_of_kept, paging_of

PAGES, KV_HEADS, GROUP, DIM, SIZE = 40, 2, 3, 64, 16
LENGTHS = (0, 1, 16, 17, 150)


def csr_attention(q, table: CSR, k, v, scale):
    """Attention of rows q [R, G, D] over pages k, v [P, S, D] that lists name, in fp64, row by row."""
    out = []
    for row in range(len(table.indptr) - 1):
        pages = table.indices[table.indptr[row] : table.indptr[row + 1]].long()
        tokens = max(0, (len(pages) - 1)) * k.shape[1] + int(table.last_page_len[row])
        keys, values = (x[pages].flatten(0, 1)[:tokens].double() for x in (k, v))
        out.append((q[row].double() @ keys.T * scale).softmax(-1) @ values)
    return torch.stack(out)


def flashinfer_table():
    """Lists of pages in no order, of sequences of LENGTHS."""
    pages = [-(-length // SIZE) for length in LENGTHS]
    indptr = torch.tensor([0, *pages]).cumsum(0).int()
    last = torch.tensor([length - (count - 1) * SIZE if count else 0 for length, count in zip(LENGTHS, pages, strict=True)])
    return CSR(indptr, torch.randperm(PAGES)[: sum(pages)].int(), last.int())


def test_tables_come_in_and_kept_sets_go_out_as_lists_of_pages():
    table = flashinfer_table()
    paging = paging_of(table, SIZE)
    assert paging.seq_lens.tolist() == list(LENGTHS)
    assert torch.equal(paging_of(table, SIZE, max_pages=12).page_table[:, :10], paging.page_table)

    kv = KV(*torch.zeros(PAGES, 2, KV_HEADS, SIZE, DIM).unbind(1))  # as FlashInfer has them
    shadow = Shadow(
        torch.zeros(PAGES, KV_HEADS, SIZE * DIM // 2, dtype=torch.uint8),
        torch.zeros(PAGES, KV_HEADS, SIZE, 2, dtype=torch.bfloat16),
        torch.arange(DIM, dtype=torch.int32).expand(KV_HEADS, -1).contiguous(),
        torch.full((KV_HEADS,), DIM, dtype=torch.int32),
    )
    batch, longest = len(LENGTHS), max(LENGTHS)
    k, v = (torch.randn(batch, longest, KV_HEADS, DIM) for _ in range(2))
    append_kv(k, v, kv, paging, shadow=shadow)
    q = torch.randn(batch, 1, KV_HEADS * GROUP, DIM) * 3
    slots = paging.page_table.shape[1] * SIZE
    kept = torch.zeros(batch, KV_HEADS, slots, dtype=torch.int32)
    counts = torch.zeros(batch, KV_HEADS, dtype=torch.int32)
    policy = Policy("full", Budget(1), Pruning(0.8), Always(2, 2))
    out, _ = decode_attention(q, kv, paging, policy, DIM**-0.5, shadow, observe=Observation(None, kept, counts))

    ours = csr_of_kept(kept, counts, paging.page_table, SIZE)
    assert 0 < counts[-1].min() < LENGTHS[-1], "nothing was pruned"
    assert ours.indptr[-1] == counts.sum()
    for head in range(KV_HEADS):
        rows = [b * KV_HEADS + head for b in range(1, batch)]
        part = [ours.indices[ours.indptr[row] : ours.indptr[row + 1]] for row in rows]
        sizes = torch.tensor([0, *(len(tokens) for tokens in part)]).cumsum(0)
        lists = CSR(sizes.int(), torch.cat(part), torch.ones(len(rows), dtype=torch.int32))
        slot_keys, slot_values = (cache[:, head].reshape(-1, 1, DIM) for cache in kv)
        query = q[1:, 0].unflatten(1, (KV_HEADS, GROUP))[:, head]
        expected = csr_attention(query, lists, slot_keys, slot_values, DIM**-0.5)
        torch.testing.assert_close(out[1:, 0].unflatten(1, (KV_HEADS, GROUP))[:, head].double(), expected, rtol=0, atol=1e-5)

    # Their table and plain attention over it, our table and our dense attention.
    dense, _ = decode_attention(q, kv, Paging(*paging), Policy("dense"), DIM**-0.5)
    query = q[:, 0].unflatten(1, (KV_HEADS, GROUP))
    for head in range(KV_HEADS):
        expected = csr_attention(query[:, head], table, kv.k_cache[:, head], kv.v_cache[:, head], DIM**-0.5)
        torch.testing.assert_close(dense[:, 0].unflatten(1, (KV_HEADS, GROUP))[:, head].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 1])}, "csr: indptr: expected a one-dimensional int32 tensor, got '1 dimensions of torch.int64'"),
        ({"last_page_len": torch.zeros(2, dtype=torch.int32)}, "csr: last_page_len: expected 1 entries, one a row of indptr, got 2"),
    ],
)
def test_a_malformed_table_is_refused_by_name(change, message):
    good = {"indptr": torch.tensor([0, 1]).int(), "indices": torch.tensor([3]).int(), "last_page_len": torch.tensor([4]).int()}
    with pytest.raises(ValueError) as caught:
        paging_of(CSR(**(good | change)), SIZE)
    assert str(caught.value) == message
