// GroupLayerNorm and AddGroupLayerNorm; the launch mirrors genrec/kernels/group_layer_norm/triton.py.
#include "operators.h"
#include "plugin.h"

namespace genrec {
namespace {

// GroupLayerNorm(x (…, D), group_ids (…), weight (G, D), bias (G, D); eps) → y (…, D)
// AddGroupLayerNorm(x, residual (…, D), group_ids, weight, bias; eps) → y, s = x + residual
template <bool ADDS>
class GroupLayerNorm final : public Plugin {
 public:
  const char* name() const noexcept override { return ADDS ? "AddGroupLayerNorm" : "GroupLayerNorm"; }
  std::vector<Tensor> inputs() const override {
    std::vector<Tensor> tensors{{"x", 'T', -1}, {"group_ids", 'j', -1}, {"weight", 'T', 2}, {"bias", 'T', 2}};
    if (ADDS) tensors.insert(tensors.begin() + 1, {"residual", 'T', -1});
    return tensors;
  }
  std::vector<Tensor> outputs() const override {
    std::vector<Tensor> tensors{{"y", 'T', -1}};
    if (ADDS) tensors.push_back({"s", 'T', -1});
    return tensors;
  }
  std::vector<Attribute> attributes() override { return {{"eps", &eps_, nullptr}}; }
  void check_attributes() const override { require(eps_ >= 0, "eps is " + std::to_string(eps_) + "; expected 0 or more"); }
  void output_shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder&) const override {
    for (int i = 0; i <= ADDS; i++) out[i] = in[0];
  }
  IPluginV3* clone() noexcept override { return new GroupLayerNorm(*this); }

  void measure(Descs in) override {
    const Dims& x = in[0].dims;
    require(x.nbDims > 0, "x has no dimensions; expected (…, D)");
    tokens_ = 1;
    for (int i = 0; i < x.nbDims - 1; i++) tokens_ *= x.d[i];
    dim_ = x.d[x.nbDims - 1], groups_ = in[kIds + 1].dims.d[0];
    name_ = kernel_name("group_layer_norm", in[0].type,
                        {{"D", dim_}, {"ids", in[kIds].type == DataType::kINT64 ? 64 : 32}, {"residual", ADDS}});
  }
  void check_shapes(Descs in) const override {
    const Dims &x = in[0].dims, &ids = in[kIds].dims;
    for (int i = 0; i < x.nbDims; i++)
      require(!ADDS || (in[1].dims.nbDims == x.nbDims && in[1].dims.d[i] == x.d[i]), "residual has not the shape of x");
    require(ids.nbDims == x.nbDims - 1,
            "group_ids has " + std::to_string(ids.nbDims) + " dimensions; expected one fewer than x");
    for (int i = 0; i < ids.nbDims; i++) require(ids.d[i] == x.d[i], "group_ids has not the shape of x without D");
    expect_shape(in, kIds + 1, {groups_, dim_}, "(G, D)");
    expect_shape(in, kIds + 2, {groups_, dim_}, "(G, D)");
  }
  std::string kernels() const override { return name_; }

  void launch(const Launcher& launcher, const void* const* in, void* const* out, char*) const override {
    const Image& image = launcher.find(name_, "_forward");
    const Argument residual = ADDS ? Argument(in[1]) : None{}, s = ADDS ? out[1] : in[0];
    launcher.launch(image, ceil_div(tokens_, image["ROWS"]),
                    {in[0], residual, in[kIds], in[kIds + 1], in[kIds + 2], out[0], s, tokens_, dim_, groups_, dim_,
                     ADDS ? dim_ : 0, eps_});
  }

 private:
  static constexpr int kIds = ADDS ? 2 : 1;  // the input that holds group_ids
  float eps_ = 0;
  int64_t tokens_ = 0, dim_ = 0, groups_ = 0;
  std::string name_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* group_layer_norm() {
  static Creator<GroupLayerNorm<false>> creator;
  return &creator;
}

nvinfer1::IPluginCreatorInterface* add_group_layer_norm() {
  static Creator<GroupLayerNorm<true>> creator;
  return &creator;
}

}  // namespace genrec
