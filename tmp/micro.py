import os, sys, time, statistics, cProfile, pstats
os.environ.setdefault("OMP_NUM_THREADS","1")
import torch
from torch import nn
torch.set_num_threads(1)
from torch.nn.functional import cross_entropy
from rawloop import Watch, WatchConfig
class Opt(torch.optim.AdamW):
    def step(self, closure=None): return None
class M(nn.Module):
    def __init__(self, n=147, size=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(n))
    def forward(self, x): return self.layers[0](x)
def norm_clip(params): return None
def build(size=64):
    torch.manual_seed(0)
    m = M(size=size); 
    for p in m.parameters(): p.grad = torch.randn_like(p)*1e-3
    o = Opt(m.parameters(), 1e-4)
    o.zero_grad = lambda *a, **k: None
    return m, o
def main(steps=300, prof=False, clip=True, size=64):
    m,o = build(size)
    x = torch.randn(4,8,size); t = torch.randint(0,size,(4,7))
    batch = {"input_ids": torch.randint(0,99,(8,2048)), "labels": torch.randint(0,99,(8,2048)), "attention_mask": torch.ones(8,2048,dtype=torch.int64)}
    parts = {}
    def user():
        logits = m(x)
        loss = cross_entropy(logits[:, :-1].flatten(0,1), t.flatten())
        loss.backward()
        if clip: nn.utils.clip_grad_norm_([m.layers[0].weight] if size == 65 else m.parameters(), 1e9)
        o.step(); o.zero_grad()
    bare = []
    for _ in range(100): user()
    for _ in range(steps):
        a=time.thread_time(); user(); bare.append(time.thread_time()-a)
    w = []
    with Watch(m, o, config=WatchConfig(every=10**6), say=lambda t: None) as watch:
        pr = cProfile.Profile()
        for i in range(steps+60):
            b = {k: v.clone() for k,v in batch.items()}
            a=time.thread_time()
            if prof and i>60: pr.enable()
            with watch.step(b): user()
            if prof and i>60: pr.disable()
            if i>60: w.append(time.thread_time()-a)
    bare.sort(); w.sort()
    f = lambda l: (1e6*l[0], 1e6*l[len(l)//10], 1e6*statistics.median(l))
    print("size", size, "bare min/p10/med %.0f %.0f %.0f"%f(bare), "watched %.0f %.0f %.0f"%f(w), "diff %.0f %.0f %.0f"%tuple(y-x for x,y in zip(f(bare), f(w))))
    if prof: pstats.Stats(pr).sort_stats("cumtime").print_stats("rawloop", 75)
main(prof="p" in sys.argv, size=int(sys.argv[1]) if len(sys.argv)>1 else 64)
