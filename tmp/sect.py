import os, sys, time
os.environ.setdefault("OMP_NUM_THREADS","1")
sys.argv=[sys.argv[0],"64"]
src=open("tmp/micro.py").read().rsplit("\nmain(",1)[0]
exec(src)
from collections import defaultdict
from rawloop.watch import watch as W, recorder as R, hooks as H, detectors as D
acc=defaultdict(list)
clock=time.thread_time_ns
def wrap(owner,name,label=None,gen=False):
    f=getattr(owner,name)
    label=label or f"{owner.__name__}.{name}"
    def g(*a,**k):
        t=clock(); r=f(*a,**k)
        if gen: r=list(r)
        acc[label].append(clock()-t); return r
    setattr(owner,name,g)
for n in ("__enter__","__exit__"): wrap(W.Block,n)
for n in ("begin","before_update","end","_before","_after","_take_passes"): wrap(W.Watch,n)
for n in ("_start_tape","_close","__torch_function__","_before_call","_after_call","_before_backward","after_update","resume","pause","line"): wrap(R.Recorder,n)
for n in ("measure","_before_step","_after_step","_clip","_zero_grad","before_backward","clear"): wrap(H.Hooks,n)
from rawloop.watch.subject import Detector
for d in D.all_detectors():
    for n in ("batch","gradients","end"):
        if n in type(d).__dict__: wrap(type(d),n,gen=True)
from rawloop.seed import RngCapture
wrap(RngCapture,"take")
from rawloop.watch import batches as B, masked, features, ids, repeats, stops
B.find_masked_=B.find_masked
def fm(look):
    t=clock(); r=list(B.find_masked_(look)); acc["find_masked"].append(clock()-t); return r
B.find_masked=fm
for c in (features.Features, ids.Ids, repeats.Repeats, stops.Stops): wrap(c,"find",gen=True)
main(steps=300)
rows=[]
for k,l in acc.items():
    n=len(l)/360; l=sorted(l[len(l)//4:])
    rows.append((l[len(l)//5]*max(n,1)/1000,k,l[0]/1000,n))
for p20,k,m,n in sorted(rows,reverse=True): print(f"{k:36s} calls/step {n:5.1f} min {m:7.1f} p20 {p20/max(n,1):7.1f} per step {p20:7.1f}")
