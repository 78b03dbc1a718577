import os
os.environ["OMP_NUM_THREADS"]="1"
import torch, time, operator, numpy as np
from itertools import chain
from torch import nn
torch.set_num_threads(1)
def t(name, f, n=200):
    for _ in range(20): f()
    l=[]
    for _ in range(n):
        a=time.thread_time(); f(); l.append(time.thread_time()-a)
    l.sort(); print(f"{name:40s} min {1e6*l[0]:8.1f} p20 {1e6*l[n//5]:8.1f}")
for size in (64, 384):
    ps=[nn.Parameter(torch.randn(size,size)) for _ in range(100)]+[nn.Parameter(torch.randn(size)) for _ in range(47)]
    for p in ps: p.grad=torch.randn_like(p)
    gs=[p.grad for p in ps]
    t(f"{size} foreach_norm dtype", lambda: torch._foreach_norm(gs,2,dtype=torch.float32),50)
    t(f"{size} foreach_norm", lambda: torch._foreach_norm(gs,2),50)
    t(f"{size} loop vector_norm", lambda: [torch.linalg.vector_norm(g) for g in gs],50)
    t(f"{size} loop norm", lambda: [g.norm() for g in gs],50)
    t(f"{size} loop dot", lambda: [torch.dot(f,f) for f in [g.view(-1) for g in gs]],50)
    t(f"{size} cat norm", lambda: torch.linalg.vector_norm(torch.cat([g.view(-1) for g in gs])),50)
    t(f"{size} cat dot", lambda: (lambda c: torch.dot(c,c))(torch.cat([g.view(-1) for g in gs])),50)
    t(f"{size} foreach_max", lambda: torch._foreach_max(gs),50)
t("grads list", lambda: [p.grad for p in ps if p.grad is not None])
t("version list", lambda: [p._version for p in ps])
V=operator.attrgetter("_version"); G=operator.attrgetter("grad")
t("version map", lambda: list(map(V,ps)))
t("version sum map", lambda: sum(map(V,ps)))
t("grad map", lambda: list(map(G,ps)))
class M(nn.Module):
    def __init__(s):
        super().__init__(); s.l=nn.ModuleList(nn.Linear(4,4,bias=False) for _ in range(147))
m=M()
t("named_parameters", lambda: list(m.named_parameters()))
ds=[d for mod in m.modules() for d in (mod._parameters, mod._modules)]
old=list(chain.from_iterable(map(dict.values,ds)))
def check():
    new=list(chain.from_iterable(map(dict.values,ds)))
    return len(new)==len(old) and all(map(operator.is_,new,old))
t("fingerprint", check)
ids=torch.randint(0,999,(8,2048))
t("aminmax", lambda: torch.aminmax(ids))
t("aminmax rows", lambda: torch.aminmax(ids,dim=1))
t("amax(1)", lambda: ids.amax(1))
t("flatten amax tolist", lambda: ids.flatten(1).amax(1).tolist())
n=ids.numpy()
t("np max", lambda: n.max()); t("np min", lambda: n.min()); t("np max1", lambda: n.max(1)); t("np min1", lambda: n.min(1)); t("numpy()", lambda: ids.numpy())
t("spread", lambda: list(ids.flatten()[::ids.numel()//24].tolist()))
t("pass", lambda: None)
from rawloop.seed import RngCapture
r=RngCapture(); t("rng", r.take)
t("python loop 1000", lambda: [i*2 for i in range(1000)])
