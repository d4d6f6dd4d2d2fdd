import time, torch, pytest
from slimkernels import models
from torch import nn
def test_a():
    for i in range(3):
        t=time.process_time(); w=time.time()
        with torch.device("meta"):
            a=torch.empty(3).device
            l=nn.Linear(4,4).weight.device
            m=models.vgg11_cifar()
        print("META", a, l, [p.device.type for p in m.parameters()][-3:], time.process_time()-t, time.time()-w)
        t=time.process_time()
        with torch.device("meta"): nn.Linear(4096,25088)
        print("lin", time.process_time()-t)
        t=time.process_time()
        with torch.device("meta"): torch.empty(3,4)
        print("empty", time.process_time()-t)
