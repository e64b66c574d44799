// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {EnumerableSet} from "@openzeppelin/contracts/utils/structs/EnumerableSet.sol";

/// @title Registry of sealed models: content id, gate, price and owner of each
/// @notice There is no admin, no fee, no custody and no pause. Only the owner of a model changes that model, and
/// money never passes through here: a node reads price and owner, and the consumer pays the owner directly.
/// @dev Rules:
/// 1. Prices are in atomic units of the model's own payment token (USDC: 6 decimals, 10000 = 0.01 USDC).
/// 2. Balances are raw units of the gate's token; decimals never enter.
/// 3. Every content id that a model ever had is in a `ContentChanged` event, numbered from 1.
/// 4. `hasAccess` fails closed: inactive, unknown, a token call that fails or does not return exactly 32 bytes.
/// 5. A model open to all is registered as such by its own function; a missing token is an error, never "open".
contract ModelVault {
    using EnumerableSet for EnumerableSet.Bytes32Set;

    /// @notice One model. The order of the members is published; readers decode it as one dynamic tuple.
    struct ModelInfo {
        string cid;
        address tokenContract;
        uint256 pricePerInference;
        address owner;
        bool active;
        uint256 totalInferences;
        uint256 createdAt;
        uint256 updatedAt;
        string[] tags;
        string version;
        uint256 minTokenBalance;
    }

    /// @notice How access is decided. Types from 2 on belong to nodes that know them; `hasAccess` denies them.
    /// @param gateType 0: balance of `tokenContract` >= `minTokenBalance`; 1: open to all
    /// @param id token id, for gate types that have one; else 0
    /// @param holdBlocks how many blocks the balance must have been held. Nodes enforce it, `hasAccess` can't
    struct Gate {
        uint8 gateType;
        uint256 id;
        uint64 holdBlocks;
    }

    /// @notice Gate type: an ERC-20 (or any contract with `balanceOf(address)`) balance.
    uint8 public constant GATE_TOKEN = 0;
    /// @notice Gate type: open to all.
    uint8 public constant GATE_OPEN = 1;
    /// @notice Categories are 0 language, 1 image generation, 2 image classification, 3 audio, 4 video,
    /// 5 multimodal, 6 other.
    uint8 public constant LAST_CATEGORY = 6;

    /// @notice The payment token of every newly registered model.
    address public immutable defaultPaymentToken;

    /// @notice A model without its tags. An owner of zero means that there is no such model.
    mapping(bytes32 modelId => ModelInfo) public models;
    /// @notice The token in which the price of a model is stated and paid.
    mapping(bytes32 modelId => address) public paymentToken;
    /// @notice Gate type, token id and hold blocks of a model.
    mapping(bytes32 modelId => Gate) public gate;
    /// @notice Hash of the model's public manifest, or zero.
    mapping(bytes32 modelId => bytes32) public manifestHash;
    /// @notice Category given at registration.
    mapping(bytes32 modelId => uint8) public category;
    /// @notice How many content ids the model has had.
    mapping(bytes32 modelId => uint256) public contentVersion;
    /// @notice Who may accept the model, or zero.
    mapping(bytes32 modelId => address) public pendingOwner;
    /// @notice Number of models that are active now.
    uint256 public totalActiveModels;

    bytes32[] private _all;
    mapping(address owner => EnumerableSet.Bytes32Set) private _byOwner;
    mapping(uint8 => bytes32[]) private _byCategory;

    event ModelRegistered(
        bytes32 indexed modelId, address indexed owner, address tokenContract, string cid, uint256 pricePerInference
    );
    event ModelUpdated(bytes32 indexed modelId, uint256 pricePerInference, bool active, uint256 timestamp);
    event PriceUpdated(bytes32 indexed modelId, uint256 oldPrice, uint256 newPrice);
    event ModelDeactivated(bytes32 indexed modelId, address indexed owner);
    event ModelReactivated(bytes32 indexed modelId, address indexed owner);
    /// @notice Declared for readers of the published interface. Never emitted: totals come from signed receipts.
    event InferenceRecorded(bytes32 indexed modelId, address indexed user, uint256 cost, uint256 timestamp);
    /// @notice The content id of a model from this transaction on; `version` counts from 1.
    event ContentChanged(bytes32 indexed modelId, string cid, uint256 version);
    event PaymentTokenUpdated(bytes32 indexed modelId, address oldToken, address newToken);
    event GateUpdated(
        bytes32 indexed modelId,
        uint8 gateType,
        address tokenContract,
        uint256 minTokenBalance,
        uint256 id,
        uint64 holdBlocks
    );
    event ManifestUpdated(bytes32 indexed modelId, bytes32 manifestHash);
    event ModelTransferStarted(bytes32 indexed modelId, address indexed owner, address indexed pendingOwner);
    event ModelTransferred(bytes32 indexed modelId, address indexed oldOwner, address indexed newOwner);

    error ModelUnknown(bytes32 modelId);
    error ModelExists(bytes32 modelId, address owner);
    error ModelIdZero();
    error NotModelOwner(bytes32 modelId, address caller, address owner);
    error NotPendingOwner(bytes32 modelId, address caller, address pendingOwner);
    error CidEmpty(bytes32 modelId);
    error GateTokenZero(bytes32 modelId);
    error GateMinimumZero(bytes32 modelId);
    error OpenGateTakesNothing(address tokenContract, uint256 minTokenBalance, uint256 id, uint64 holdBlocks);
    error PaymentTokenZero();
    error CategoryUnknown(uint8 category, uint8 last);
    error AlreadyInState(bytes32 modelId, bool active);

    modifier onlyModelOwner(bytes32 modelId) {
        address owner = models[modelId].owner;
        if (owner == address(0)) revert ModelUnknown(modelId);
        if (msg.sender != owner) revert NotModelOwner(modelId, msg.sender, owner);
        _;
    }

    /// @param defaultPaymentToken_ the token of every price until an owner chooses another; never zero
    constructor(address defaultPaymentToken_) {
        if (defaultPaymentToken_ == address(0)) revert PaymentTokenZero();
        defaultPaymentToken = defaultPaymentToken_;
    }

    // --- registration -----------------------------------------------------------------------------------------

    /// @notice Registers a model gated by a token balance; the caller becomes its owner. First come, first served.
    /// @param modelId keccak256 of the model's text id, or any 32 bytes published as hex
    /// @param pricePerInference atomic units of the default payment token; 0 is free
    /// @param minTokenBalance raw units of `tokenContract`, at least 1
    function registerModel(
        bytes32 modelId,
        string calldata cid,
        address tokenContract,
        uint256 pricePerInference,
        uint8 category_,
        string[] memory tags,
        string calldata version,
        uint256 minTokenBalance
    ) external {
        _requireTokenGate(modelId, tokenContract, minTokenBalance);
        ModelInfo storage model = _register(modelId, cid, pricePerInference, category_, tags, version);
        model.tokenContract = tokenContract;
        model.minTokenBalance = minTokenBalance;
        emit ModelRegistered(modelId, msg.sender, tokenContract, cid, pricePerInference);
        emit GateUpdated(modelId, GATE_TOKEN, tokenContract, minTokenBalance, 0, 0);
    }

    /// @notice Registers a model that anybody may use, for its price; the caller becomes its owner.
    /// @dev Its tuple shows `tokenContract` and `minTokenBalance` zero and `gate(modelId)` says type 1.
    function registerOpenModel(
        bytes32 modelId,
        string calldata cid,
        uint256 pricePerInference,
        uint8 category_,
        string[] memory tags,
        string calldata version
    ) external {
        _register(modelId, cid, pricePerInference, category_, tags, version);
        gate[modelId].gateType = GATE_OPEN;
        emit ModelRegistered(modelId, msg.sender, address(0), cid, pricePerInference);
        emit GateUpdated(modelId, GATE_OPEN, address(0), 0, 0, 0);
    }

    // --- the owner changes his model --------------------------------------------------------------------------

    /// @param newPrice atomic units of the model's payment token; 0 is free
    function updatePrice(bytes32 modelId, uint256 newPrice) external onlyModelOwner(modelId) {
        _setPrice(modelId, newPrice);
        _touch(modelId);
    }

    /// @notice Changes content, tags and version text. The same content id keeps its number.
    function updateModelMetadata(bytes32 modelId, string calldata cid, string[] memory tags, string calldata version)
        external
        onlyModelOwner(modelId)
    {
        ModelInfo storage model = models[modelId];
        if (keccak256(bytes(cid)) != keccak256(bytes(model.cid))) _setContent(modelId, cid);
        model.tags = tags;
        model.version = version;
        _touch(modelId);
    }

    /// @notice Changes the payment token and, in the same breath, the price: an old number in a new unit is a trap.
    /// @param newPrice atomic units of `token`
    function setPaymentToken(bytes32 modelId, address token, uint256 newPrice) external onlyModelOwner(modelId) {
        if (token == address(0)) revert PaymentTokenZero();
        emit PaymentTokenUpdated(modelId, paymentToken[modelId], token);
        paymentToken[modelId] = token;
        _setPrice(modelId, newPrice);
        _touch(modelId);
    }

    /// @notice Changes the gate as a whole. For `GATE_OPEN` all other values are zero.
    function setGate(
        bytes32 modelId,
        uint8 gateType,
        address tokenContract,
        uint256 minTokenBalance,
        uint256 id,
        uint64 holdBlocks
    ) external onlyModelOwner(modelId) {
        if (gateType != GATE_OPEN) {
            _requireTokenGate(modelId, tokenContract, minTokenBalance);
        } else if (tokenContract != address(0) || minTokenBalance != 0 || id != 0 || holdBlocks != 0) {
            revert OpenGateTakesNothing(tokenContract, minTokenBalance, id, holdBlocks);
        }
        gate[modelId] = Gate(gateType, id, holdBlocks);
        models[modelId].tokenContract = tokenContract;
        models[modelId].minTokenBalance = minTokenBalance;
        emit GateUpdated(modelId, gateType, tokenContract, minTokenBalance, id, holdBlocks);
        _touch(modelId);
    }

    /// @notice Names the hash of the public manifest; zero takes it back.
    function setManifestHash(bytes32 modelId, bytes32 hash) external onlyModelOwner(modelId) {
        manifestHash[modelId] = hash;
        emit ManifestUpdated(modelId, hash);
        _touch(modelId);
    }

    /// @notice No node serves the model from now on, and `hasAccess` is false for everybody.
    function deactivateModel(bytes32 modelId) external onlyModelOwner(modelId) {
        _setActive(modelId, false);
        totalActiveModels -= 1;
        emit ModelDeactivated(modelId, msg.sender);
        _touch(modelId);
    }

    function reactivateModel(bytes32 modelId) external onlyModelOwner(modelId) {
        _setActive(modelId, true);
        totalActiveModels += 1;
        emit ModelReactivated(modelId, msg.sender);
        _touch(modelId);
    }

    /// @notice Offers the model to `newOwner`, who has to accept it; zero withdraws the offer.
    function transferModel(bytes32 modelId, address newOwner) external onlyModelOwner(modelId) {
        pendingOwner[modelId] = newOwner;
        emit ModelTransferStarted(modelId, msg.sender, newOwner);
    }

    /// @notice Takes over a model that its owner offered to the caller. Payments go to the new owner from here on.
    function acceptModel(bytes32 modelId) external {
        address pending = pendingOwner[modelId];
        if (msg.sender != pending) revert NotPendingOwner(modelId, msg.sender, pending);
        address oldOwner = models[modelId].owner;
        delete pendingOwner[modelId];
        models[modelId].owner = msg.sender;
        _byOwner[oldOwner].remove(modelId);
        _byOwner[msg.sender].add(modelId);
        emit ModelTransferred(modelId, oldOwner, msg.sender);
        _touch(modelId);
    }

    // --- reading ----------------------------------------------------------------------------------------------

    /// @notice Everything the published tuple holds. An unknown model is all zeros: its `owner` is the zero address.
    function getModelInfo(bytes32 modelId) external view returns (ModelInfo memory) {
        return models[modelId];
    }

    /// @notice Whether the gate is open for `user` now. Hold blocks are not looked at: nodes do that.
    function hasAccess(bytes32 modelId, address user) external view returns (bool) {
        ModelInfo storage model = models[modelId];
        if (!model.active) return false;
        uint8 gateType = gate[modelId].gateType;
        if (gateType == GATE_OPEN) return true;
        if (gateType != GATE_TOKEN) return false;
        (bool known, uint256 have) = _balanceOf(model.tokenContract, user);
        return known && have >= model.minTokenBalance;
    }

    function totalModels() external view returns (uint256) {
        return _all.length;
    }

    /// @notice Always 0: nobody may write totals here. Totals come from signed receipts.
    function totalInferences() external pure returns (uint256) {
        return 0;
    }

    function getModelsByOwner(address owner) external view returns (bytes32[] memory) {
        return _byOwner[owner].values();
    }

    function getModelsByCategory(uint8 category_) external view returns (bytes32[] memory) {
        return _byCategory[category_];
    }

    /// @notice At most `limit` ids in the order of registration, from `offset` on; past the end an empty list.
    function getAllModels(uint256 offset, uint256 limit) external view returns (bytes32[] memory page) {
        uint256 total = _all.length;
        uint256 left = offset < total ? total - offset : 0;
        page = new bytes32[](limit < left ? limit : left);
        for (uint256 i = 0; i < page.length; ++i) {
            page[i] = _all[offset + i];
        }
    }

    /// @notice An id that depends on its owner, so that no other model collides with it by accident.
    function generateModelId(address owner, string calldata name, string calldata version)
        external
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(owner, name, version));
    }

    // --- inside -----------------------------------------------------------------------------------------------

    function _register(
        bytes32 modelId,
        string calldata cid,
        uint256 pricePerInference,
        uint8 category_,
        string[] memory tags,
        string calldata version
    ) private returns (ModelInfo storage model) {
        model = models[modelId];
        if (modelId == bytes32(0)) revert ModelIdZero();
        if (model.owner != address(0)) revert ModelExists(modelId, model.owner);
        if (category_ > LAST_CATEGORY) revert CategoryUnknown(category_, LAST_CATEGORY);
        model.pricePerInference = pricePerInference;
        model.owner = msg.sender;
        model.active = true;
        model.createdAt = block.timestamp;
        model.updatedAt = block.timestamp;
        model.tags = tags;
        model.version = version;
        category[modelId] = category_;
        paymentToken[modelId] = defaultPaymentToken;
        totalActiveModels += 1;
        _all.push(modelId);
        _byOwner[msg.sender].add(modelId);
        _byCategory[category_].push(modelId);
        _setContent(modelId, cid);
    }

    function _setContent(bytes32 modelId, string calldata cid) private {
        if (bytes(cid).length == 0) revert CidEmpty(modelId);
        models[modelId].cid = cid;
        uint256 number = contentVersion[modelId] + 1;
        contentVersion[modelId] = number;
        emit ContentChanged(modelId, cid, number);
    }

    function _setPrice(bytes32 modelId, uint256 newPrice) private {
        emit PriceUpdated(modelId, models[modelId].pricePerInference, newPrice);
        models[modelId].pricePerInference = newPrice;
    }

    function _setActive(bytes32 modelId, bool active) private {
        if (models[modelId].active == active) revert AlreadyInState(modelId, active);
        models[modelId].active = active;
    }

    function _touch(bytes32 modelId) private {
        ModelInfo storage model = models[modelId];
        model.updatedAt = block.timestamp;
        emit ModelUpdated(modelId, model.pricePerInference, model.active, block.timestamp);
    }

    function _requireTokenGate(bytes32 modelId, address tokenContract, uint256 minTokenBalance) private pure {
        if (tokenContract == address(0)) revert GateTokenZero(modelId);
        if (minTokenBalance == 0) revert GateMinimumZero(modelId);
    }

    /// @dev Assembly, so that a hostile token can neither return megabytes nor pass 31 or 64 bytes off as a number.
    function _balanceOf(address token, address user) private view returns (bool known, uint256 have) {
        bytes memory data = abi.encodeWithSignature("balanceOf(address)", user);
        assembly ("memory-safe") {
            known := staticcall(gas(), token, add(data, 0x20), mload(data), 0x00, 0x20)
            known := and(known, eq(returndatasize(), 0x20))
            have := mload(0x00)
        }
    }
}
