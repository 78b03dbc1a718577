import os, sys, time, random, statistics, cProfile, pstats
os.environ.setdefault("OMP_NUM_THREADS","1")
sys.path.insert(0, "tests/benchmarks")
import torch
torch.set_num_threads(1)
import watch_overhead as w
from rawloop import Watch, WatchConfig
def main(mode="fp32", steps=60, hidden=64, layers=16, every=10**6, prof=False):
    work = w.Work(rows=1,length=8,hidden=hidden,layers=layers,vocab=64,mode=mode)
    bare, watched = w.Peer(work), w.Peer(work)
    print(len(list(bare.model.parameters())), "tensors")
    tb, tw = [], []
    def timed(p, ids):
        t=time.thread_time(); 
        if p.watch is None: p.step(ids)
        else:
            with p.watch.step({"input_ids": ids}): p.step(ids)
        return 1e6*(time.thread_time()-t)
    with Watch(watched.model, watched.optimizer, watched.scaler, config=WatchConfig(every=every)) as watch:
        watched.watch = watch
        for i, ids in enumerate(w.batches(work, 12+steps)):
            if i >= 12 and prof and i == 12:
                pr = cProfile.Profile()
            a = [(bare,tb),(watched,tw)]; random.shuffle(a)
            for p,l in a:
                if prof and i>=12 and p is watched:
                    pr.enable(); timed(p,ids); pr.disable()
                else:
                    x = timed(p, ids)
                    if i>=12: l.append(x)
        for f in watch.findings: print(f.kind, f.ordinary)
    if prof:
        st = pstats.Stats(pr); st.sort_stats("cumulative").print_stats("rawloop|watch", 45)
    else:
        print(f"{mode} bare {statistics.median(tb):.0f} us watched {statistics.median(tw):.0f} diff-median {statistics.median(x-y for x,y in zip(tw,tb)):.0f} diff-min {min(tw)-min(tb):.0f}")
if __name__ == "__main__":
    mode = sys.argv[1]; main(mode, int(sys.argv[2]), prof=len(sys.argv)>3)
