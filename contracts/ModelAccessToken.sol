// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Address} from "@openzeppelin/contracts/utils/Address.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";

/// @title A token whose holders may use a model
/// @notice A plain ERC-20 with 18 decimals. The owner mints and may offer tokens for sale; what buyers pay goes to
/// the owner within the same transaction. Nobody can freeze, pause or burn what another holds.
contract ModelAccessToken is ERC20, Ownable2Step {
    using SafeERC20 for IERC20;

    /// @notice What one whole token (10^18 raw units) costs, in atomic units of `salePaymentToken`; 0: not for sale.
    uint256 public salePrice;
    /// @notice The ERC-20 that buyers pay with; the zero address is the native coin.
    address public salePaymentToken;

    event SaleChanged(address indexed paymentToken, uint256 price);
    event Sold(address indexed buyer, uint256 amount, address indexed paymentToken, uint256 cost);

    error NotForSale();
    error SaleTermsChanged(address paymentToken, uint256 cost, address expectedToken, uint256 maxCost);
    error ValueMismatch(uint256 sent, uint256 needed);
    error AmountZero();

    constructor(string memory name_, string memory symbol_, address owner_) ERC20(name_, symbol_) Ownable(owner_) {}

    /// @notice The owner, under its published name.
    function modelOwner() external view returns (address) {
        return owner();
    }

    /// @notice Gives `amount` raw units to `to`.
    function mint(address to, uint256 amount) external onlyOwner {
        _mint(to, amount);
    }

    /// @notice Opens, changes or (with price 0) closes the sale.
    function setSale(address paymentToken, uint256 price) external onlyOwner {
        salePaymentToken = paymentToken;
        salePrice = price;
        emit SaleChanged(paymentToken, price);
    }

    /// @notice What `amount` raw units cost now, rounded up to the next atomic unit.
    function costOf(uint256 amount) public view returns (uint256) {
        return Math.mulDiv(amount, salePrice, 1e18, Math.Rounding.Ceil);
    }

    /// @notice Buys `amount` raw units. Naming token and limit protects the buyer from terms changed meanwhile.
    /// @param paymentToken the token he means to pay with; zero: the native coin, sent along exactly
    /// @param maxCost the most he pays, in atomic units of it
    function buy(uint256 amount, address paymentToken, uint256 maxCost) external payable {
        address seller = owner();
        if (amount == 0) revert AmountZero();
        if (salePrice == 0 || seller == address(0)) revert NotForSale(); // a renounced token has nobody to pay
        uint256 cost = costOf(amount);
        if (paymentToken != salePaymentToken || cost > maxCost) {
            revert SaleTermsChanged(salePaymentToken, cost, paymentToken, maxCost);
        }
        uint256 value = paymentToken == address(0) ? cost : 0;
        if (msg.value != value) revert ValueMismatch(msg.value, value);
        _mint(msg.sender, amount);
        emit Sold(msg.sender, amount, paymentToken, cost);
        if (paymentToken == address(0)) {
            Address.sendValue(payable(seller), cost);
        } else {
            IERC20(paymentToken).safeTransferFrom(msg.sender, seller, cost);
        }
    }
}
