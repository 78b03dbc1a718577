import os
os.environ["OMP_NUM_THREADS"]="1"
import torch, time, sys, cProfile, pstats
torch.set_num_threads(1)
from torch import nn
from rawloop.watch.batches import Batches
from rawloop.watch.subject import *
from rawloop.dist import World
m=nn.Linear(2,2)
s=Subject(m,[],None,lambda: m.named_parameters())
d=Batches()
bs=[{"input_ids": torch.randint(0,99,(8,2048)), "labels": torch.randint(0,99,(8,2048)), "attention_mask": torch.ones(8,2048,dtype=torch.int64)} for _ in range(30)]
l=[]
pr=cProfile.Profile()
for i in range(600):
    r=StepRecord(i,bs[i%30]); a=time.thread_time()
    if len(sys.argv)>1 and i>50: pr.enable()
    list(d.batch(s,r)); 
    pr.disable()
    l.append(time.thread_time()-a); list(d.end(s,r))
l=sorted(l[100:]); print("min %.1f p20 %.1f med %.1f"%tuple(1e6*x for x in (l[0],l[100],l[250])))
if len(sys.argv)>1: pstats.Stats(pr).sort_stats("cumtime").print_stats(40)
