import torch, ptq161, pytest
from tests.conftest import every_method, VPTQ_WITH_ALL
from ptq161.estimate.sizes import packed_sizes
from ptq161.estimate.shapes import empty_model
from ptq161.models.settings import ModelConfig
from ptq161.packed.model import measure, cast_rest
M=every_method(2,1)|{'vptq_all':VPTQ_WITH_ALL,'gptq_g':ptq161.GPTQ(bits=3,group_size=24,act_order=True),'water_model':ptq161.Waterfill(epochs=1,batch_size=2),'qdrop_act':ptq161.QDrop(bits=2,steps=2,batch_size=2,activation_bits=8)}
@pytest.mark.parametrize('name',M)
def test(name,tiny_model,tmp_path):
    for arch in ('llama',):
        model=tiny_model(arch)
        model.save_pretrained(tmp_path/arch)
        m=M[name]
        predicted=packed_sizes(empty_model(ModelConfig('x',path=str(tmp_path/arch))),m,torch.bfloat16)
        tokens=torch.randint(0,256,(4,24),generator=torch.Generator().manual_seed(0))
        model=ptq161.quantize(model,tokens,m); cast_rest(model,torch.bfloat16)
        f=ptq161.save(model,None,tmp_path/'out')
        size=measure(model)
        print(name,size.linear_bytes,predicted.linear_bytes,size.other_bytes,predicted.other_bytes,f.stat().st_size,predicted.checkpoint_bytes)
