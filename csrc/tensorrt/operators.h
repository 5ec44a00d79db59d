// The creators of all plugins: what registry.cpp hands to TensorRT.
#pragma once

#include <NvInferRuntime.h>

namespace genrec {

nvinfer1::IPluginCreatorInterface* group_layer_norm();
nvinfer1::IPluginCreatorInterface* add_group_layer_norm();
nvinfer1::IPluginCreatorInterface* relu_attention();
nvinfer1::IPluginCreatorInterface* relu_attention_limited();
nvinfer1::IPluginCreatorInterface* moe_route();
nvinfer1::IPluginCreatorInterface* moe_experts();

}  // namespace genrec
