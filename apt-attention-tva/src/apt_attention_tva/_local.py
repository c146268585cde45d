import torch


class KVCache:
    def __init__(self, batch, heads, max_seq_len, width, dtype, device):
        self.k = torch.full((batch, heads, max_seq_len, width), torch.nan, dtype=dtype, device=device)
        self.v = self.k.clone()
        self.length = 0

    def append(self, k, v):
        n = self.length + k.shape[2]
        self.k[:, :, self.length : n] = k
        self.v[:, :, self.length : n] = v
        self.length = n
        return self.k[:, :, :n], self.v[:, :, :n]


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    f = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    a = (positions.unsqueeze(1).unsqueeze(-1).double() * f)
    c, s = a.cos().to(x.dtype), a.sin().to(x.dtype)
    l, r = x.chunk(2, -1)
    return torch.cat((l * c - r * s, l * s + r * c), -1)


def attend(q, k, v, *, causal, mask, dropout, scale):
    t, n = q.shape[2], k.shape[2]
    m = None
    if mask is not None:
        m = mask[:, None, None, :]
    if causal and (mask is not None or t != n) and t > 1:
        c = torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t)
        m = c if m is None else m & c
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=m, is_causal=causal and m is None and t == n, dropout_p=dropout, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1])
